"""Checkpoints of bitsandbytes' 4 bits: its numbers bit for bit, or an error."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import adapt, apply_named, lora, merge, rounding_loss
from jaxft.checkpoints import load_model, model_shapes, open_model, save_model
from jaxft.checkpoints.bitsandbytes import kept
from jaxft.kernels.nf4 import NF4_LEVELS
from jaxft.models import CheckpointError, Decoder, DecoderConfig, Entry, unstack_layers
from jaxft.parallel import make_mesh
from jaxft.weights import Nf4Weight, is_weight, matmul, to_dense

FILE = "model.safetensors"
# bitsandbytes' table of FP4, over its largest: get_4bit_type in functional.py.
FP4 = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12)
LEVELS = {"nf4": NF4_LEVELS, "fp4": np.concatenate([FP4, -FP4])}
TABLE = np.sort(np.random.default_rng(3).uniform(-1, 1, 256)).astype(np.float32)


def round_off(weight, *, kind="nf4", block=64, nested=256, storage=np.uint8, dtype="bfloat16"):
    """The parts of a rounded weight [out, in], by suffix, as bitsandbytes stores it."""
    flat = np.asarray(weight, np.float32).reshape(-1)
    blocks = -(-flat.size // block)
    parts = np.pad(flat, (0, blocks * block - flat.size)).reshape(blocks, block)
    largest = np.abs(parts).max(1)
    codes = np.abs(parts[..., None] / largest[:, None, None] - LEVELS[kind]).argmin(-1)
    codes = codes.reshape(-1)[: flat.size].astype(np.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
    packed = (codes[::2] << 4 | codes[1::2]).view(storage)[:, None]
    found = {"": packed, ".quant_map": LEVELS[kind]}
    if nested:
        offset, groups = largest.mean(), -(-blocks // nested)
        rest = np.pad(largest - offset, (0, groups * nested - blocks)).reshape(groups, nested)
        widest = np.abs(rest).max(1)
        small = np.abs((rest / widest[:, None])[..., None] - TABLE).argmin(-1)
        state |= {
            "nested_blocksize": nested,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
        found |= {".nested_absmax": widest, ".nested_quant_map": TABLE}
        found[".absmax"] = small.reshape(-1)[:blocks].astype(np.uint8)
    else:
        found[".absmax"] = largest
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return found | {f".quant_state.bitsandbytes__{kind}": text}


def slowly(parts):
    """bitsandbytes' dequantize_4bit, one number at a time, in float32."""
    (key,) = (key for key in parts if "quant_state" in key)
    state = json.loads(bytes(parts[key]))
    packed, result = parts[""].reshape(-1).view(np.uint8), np.zeros(state["shape"], np.float32)
    for i in range(result.size):
        byte, block = int(packed[i // 2]), i // state["blocksize"]
        scale = parts[".absmax"][block]
        if ".nested_absmax" in parts:
            group = parts[".nested_absmax"][block // state["nested_blocksize"]]
            scale = np.float32(parts[".nested_quant_map"][scale] * group)
            scale = np.float32(scale + np.float32(state["nested_offset"]))
        level = parts[".quant_map"][byte >> 4 if i % 2 == 0 else byte & 15]
        result.flat[i] = np.float32(level * scale)
    return result


def tiny(path, hidden=64):
    """A model of two layers, saved; hidden sizes of 64 inputs are whole blocks."""
    config = DecoderConfig(
        vocab_size=11, hidden_size=hidden, intermediate_size=hidden, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=hidden // 2, max_length=8, tie_embeddings=False,
    )  # fmt: skip
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda s: draw.normal(size=s.shape).astype(np.float32), shapes["params"])
    save_model(path, Decoder(config), params)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """With whole blocks of 64 inputs."""
    return tiny(tmp_path_factory.mktemp("dense"), 64)


def rounded(dense, path, change=lambda tensors: None, settings=None, **options):
    """(the directory with rounded projections, name -> parts of each)."""
    tensors, parts = load_file(dense / FILE), {}
    for name in sorted(tensors):
        if tensors[name].ndim == 2 and "_proj" in name:
            parts[name] = round_off(tensors.pop(name), **options)
            tensors |= {name + suffix: part for suffix, part in parts[name].items()}
    change(tensors)
    save_file(tensors, path / FILE)
    config = json.loads((dense / "config.json").read_text())
    settings = settings or {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path, parts


PLACES = {
    "model.layers.0.self_attn.q_proj.weight": ("0", "attention", "query"),
    "model.layers.1.mlp.down_proj.weight": ("1", "mlp", "down"),
}


def kernels(params):
    """torch's name of some kernels -> the kernel."""
    return {
        name: params["layers"][layer][part][ours]["kernel"]
        for name, (layer, part, ours) in PLACES.items()
    }


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, jnp.float32),
        (dict(nested=0), None),
        (dict(nested=4, storage=ml_dtypes.bfloat16), jnp.float32),
        (dict(block=128), None),
        (dict(kind="fp4", dtype="float16"), jnp.float32),
    ],
    ids=["nested", "plain", "stored as bfloat16", "blocks over outputs", "fp4"],
)
@pytest.mark.filterwarnings("ignore:.*14 of its 14 4-bit tensors are dequantised as they are read")
def test_numbers_are_bitsandbytes_bit_for_bit(options, dtype, wide, tmp_path):
    path, parts = rounded(wide, tmp_path, **options)
    _, params = load_model(path, dtype=dtype)
    for name, kernel in kernels(params).items():
        assert isinstance(kernel, Nf4Weight) == (not {"block", "kind"} & options.keys())
        found, expected = to_dense(kernel), slowly(parts[name]).T
        assert found.dtype == (dtype or "bfloat16")
        np.testing.assert_array_equal(found, expected.astype(found.dtype))
    same = lambda a, s: a.shape == s.shape and a.dtype == s.dtype
    assert all(jax.tree.leaves(jax.tree.map(same, params, model_shapes(path, dtype=dtype))))


def test_blocks_that_run_over_an_output_are_read_dense(tmp_path):
    """24 inputs: a block of 64 holds two outputs and two thirds; the last one is not whole."""
    (tmp_path / "rounded").mkdir()
    path, parts = rounded(tiny(tmp_path / "dense", 24), tmp_path / "rounded", nested=4)
    with pytest.warns(
        UserWarning, match="14 of its 14 4-bit tensors are dequantised as they are read"
    ):
        read = open_model(path).read
    for name in PLACES:
        np.testing.assert_array_equal(read(Entry(name, ()))[...], slowly(parts[name]))
        np.testing.assert_array_equal(
            read(Entry(name, ()))[3:7, 2:9], slowly(parts[name])[3:7, 2:9]
        )


def test_on_a_mesh_and_stacked_it_is_the_same(wide, tmp_path):
    path, parts = rounded(wide, tmp_path)
    _, params = load_model(path, mesh=make_mesh(fsdp=4, tensor=2), scan_layers=True)
    query = params["layers"]["attention"]["query"]["kernel"]
    assert isinstance(query, Nf4Weight) and query.stack == (2,)
    assert len(query.codes.sharding.device_set) == 8
    for name, kernel in kernels(merge(unstack_layers(params))).items():
        np.testing.assert_array_equal(kernel, slowly(parts[name]).T.astype(kernel.dtype))


def test_it_is_a_frozen_base_and_leaves_as_a_dense_model(wide, tmp_path):
    """LoRA trains beside it; what is saved says nothing of bitsandbytes."""
    path, parts = rounded(wide, tmp_path)
    model, params = load_model(path, dtype=jnp.float32)
    adapted = adapt(jax.random.key(0), params, {".*/query/kernel": lora(2)})
    query = adapted["layers"]["0"]["attention"]["query"]["kernel"]
    assert isinstance(query.base, Nf4Weight) and rounding_loss(adapted, params) is None
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(matmul(x, query), x @ to_dense(query), atol=1e-4)
    save_model(tmp_path / "out", model, merge(adapted))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    _, again = load_model(tmp_path / "out")
    assert not any(map(is_weight, jax.tree.leaves(again, is_leaf=is_weight)))
    for name, kernel in kernels(again).items():
        np.testing.assert_array_equal(kernel, slowly(parts[name]).T)
    with pytest.raises(ValueError, match="rounded already .Nf4Weight.*leave --quantise out"):
        apply_named(params, "lora", rank=2, quantise="int8")
    with pytest.raises(
        ValueError, match="--adapter full trains the kernels themselves, and layers/0"
    ):
        apply_named(params, "full")


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED = {
    "no scales": (lambda t: t.pop(f"{Q}.absmax"), {}, "q_proj.weight' is not a whole 4-bit tensor"),
    "no scales of scales": (
        lambda t: t.pop(f"{Q}.nested_absmax"), {}, "q_proj.weight' is not a whole 4-bit tensor"
    ),
    "no codes": (lambda t: t.pop(Q), {}, "q_proj.weight' is not a whole 4-bit tensor"),
    "half a table": (
        lambda t: t.update({f"{Q}.quant_map": NF4_LEVELS[:8]}), {}, "not a whole .*8 levels"
    ),
    "another size": (lambda t: t.update({Q: t[Q][:-1]}), {}, "not a whole .*bytes and"),
    "damaged": (
        lambda t: t.update({f"{Q}.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}), {}, "not a whole"
    ),
    "a part too many": (
        lambda t: t.update({"model.norm.weight.absmax": NF4_LEVELS}), {}, "bitsandbytes: tensor 'model.norm"
    ),
    "8 bits": (lambda t: None, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bit"),
    "unsaid": (lambda t: None, {"quant_method": "awq"}, "AWQ"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_is_refused(name, wide, tmp_path):
    change, settings, message = REFUSED[name]
    path, _ = rounded(wide, tmp_path, change, settings)
    with pytest.raises(CheckpointError, match=message):
        open_model(path)


def test_other_layouts_are_refused(wide, tmp_path):
    config = json.loads((wide / "config.json").read_text())
    (tmp_path / FILE).write_bytes((wide / FILE).read_bytes())
    config["quantization_config"] = {"load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says load_in_4bit, but no tensor is"):
        open_model(tmp_path)
    path, _ = rounded(wide, tmp_path)
    read = open_model(path).read
    conv1d = Entry(Q, ("layers/0/attention/query/kernel",), transposed=False)
    with pytest.raises(CheckpointError, match="is a Conv1D in bitsandbytes' 4 bits"):
        kept(path, [conv1d], read, "layers")
