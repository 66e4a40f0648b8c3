"""GGUF files that are written: read again by jaxft, by the gguf package and by transformers."""

import dataclasses

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import AdapterError, merge
from jaxft.checkpoints import (
    CheckpointError,
    load_gguf_adapter,
    load_model,
    save_gguf,
    save_gguf_adapter,
)
from jaxft.checkpoints.assemble import disassemble, layer_shapes
from jaxft.models import Decoder, config_of, family_of, stack_layers
from jaxft.models.config import Rope
from jaxft.models.rope import attention_factor, rope_frequencies
from jaxft.output import OutputError
from jaxft.weights import DoraWeight, Frozen, LoraWeight

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
WINDOW = dict(sliding_window=4, head_dim=12, query_pre_attn_scalar=12)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5)
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}  # fmt: skip
ENCODER = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)  # fmt: skip
FILES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama3.1": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "gemma": {"head_dim": 12},
    "gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": WINDOW | {"sliding_window_pattern": 2, "rope_parameters": GEMMA3},
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}


def model_of(name):
    """(model, params, config.json) of a small random decoder."""
    kind = name.split(".")[0].removesuffix("3" if name.startswith("llama") else "")
    json = {"model_type": kind, **(SIZES if kind != "gpt2" else {}), **FILES[name]}
    model = Decoder(config_of(json))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
    return model, jax.tree.map(draw, layer_shapes(model)), json


def turns(config, layer):
    """The frequencies and the attention factor of a layer's rotary positions."""
    local = config.window(layer) is not None
    rope = config.local_rope if local and config.local_rope else config.rope
    if rope is None:
        return []
    factor = attention_factor(rope)
    return [*rope_frequencies(rope, config.head_dim), factor]


@pytest.mark.parametrize("name", list(FILES))
def test_a_model_comes_back_and_transformers_reads_the_same_weights(tmp_path, name):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params, json = model_of(name)
    stacked = stack_layers(params) if name == "qwen2" else params
    save_gguf(tmp_path / "m.gguf", model, stacked, kind="f32", name="random")
    read, loaded = load_model(tmp_path / "m.gguf")
    own = dict.fromkeys("family special rope local_rope windows attention_scale".split())
    assert dataclasses.replace(read.config, **own) == dataclasses.replace(model.config, **own)
    assert read.config.scale == pytest.approx(model.config.scale)
    for i in range(model.config.num_layers):
        assert read.config.window(i) == model.config.window(i)
        np.testing.assert_allclose(turns(read.config, i), turns(model.config, i), rtol=1e-6)
    # A norm of Gemma goes through 1 + scale in float32.
    atol = 2e-7 if "gemma" in name else 0
    chex.assert_trees_all_close(loaded, params, atol=atol, rtol=0)
    if name == "gemma":
        return  # transformers reads no such GGUF files
    # In a file Mistral is a Llama.
    config = hf.AutoConfig.for_model(
        **json | ({"model_type": "llama"} if name == "mistral" else {})
    )
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32
    )
    theirs = {key: tensor.detach().numpy() for key, tensor in theirs.named_parameters()}
    ours = dict(disassemble(family_of(model.config).huggingface.entries(model.config), params))
    chex.assert_trees_all_close(theirs, ours, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    """A Llama whose embeddings are too narrow for blocks of 32, beside matrices that are not."""
    model, params, _ = model_of("llama")
    narrow = Decoder(dataclasses.replace(model.config, hidden_size=48, head_dim=12))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
    return narrow, jax.tree.map(draw, layer_shapes(narrow))


@pytest.mark.parametrize(
    "kind, error", [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7)]
)
def test_types_are_llama_cpps(tmp_path, tiny, kind, error):
    save_gguf(tmp_path / "m.gguf", *tiny, kind=kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    assert types["blk.0.ffn_down.weight"] == kind.upper()  # rows of 64
    assert types["token_embd.weight"] == {"q8_0": "F16"}.get(kind, kind.upper())  # rows of 48
    file_type = reader.get_field("general.file_type").contents()
    names = {"f32": "ALL_F32"}
    assert file_type == gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind.upper()}")]
    _, loaded = load_model(tmp_path / "m.gguf")
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny[1]), strict=True):
        assert jnp.abs(got - wanted).max() <= error * jnp.abs(wanted).max()


def test_a_number_beyond_float16_and_a_full_disk_leave_no_file(tmp_path, tiny, monkeypatch):
    model, params = tiny
    file = tmp_path / "m.gguf"
    file.write_bytes(b"before")
    far = params | {"embed": {"embedding": params["embed"]["embedding"] + 1e5}}
    with pytest.raises(CheckpointError, match="'token_embd.weight' has values up to 1e.05, beyond"):
        save_gguf(file, model, far, kind="f16")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="m.gguf could not be written: No space left"):
        save_gguf(file, model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert file.read_bytes() == b"before"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "mistral",
            {"windows": (4, 4, 4)},
            r"windows is \(4, 4, 4\), but .* 'llama' can only mean",
        ),
        ("qwen2", {"rope": Rope(factors=(1, 2, 3, 4))}, "rope is .*'qwen2' can only mean"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("gemma", {"activation": "gelu"}, "activation is gelu, but .* can only mean gelu_tanh"),
        ("gemma", {"tie_embeddings": False}, "tie_embeddings is False, but .* only mean True"),
        ("gemma2", {"tie_embeddings": False}, "tie_embeddings is False, but .* only mean True"),
        ("gemma2", {"attention_softcap": None}, "attention_softcap is None, but .* only mean 50"),
        ("gemma3_text", {"windows": (None, 4, 4)}, r"windows is \(None, 4, 4\)"),
        ("gemma3_text", {"attention_scale": 0.2}, "attention_scale is 0.2"),
        ("gpt2", {"activation": "silu"}, "activation is silu"),
        ("bert", {}, "bert: jaxft writes no GGUF files of this family"),
    ],
)
def test_what_a_gguf_file_cannot_say_is_named_before_work(tmp_path, name, change, message):
    sizes = {} if name == "gpt2" else SIZES
    json = {"model_type": name, **(FILES[name] | sizes if name in FILES else ENCODER)}
    config = config_of(json)
    model = Decoder(dataclasses.replace(config, **change) if change else config)
    with pytest.raises(CheckpointError, match=message):
        save_gguf(tmp_path / "m.gguf", model, {})
    assert not list(tmp_path.iterdir())


def with_weights(params, weights):
    """The params frozen, except weights of ending paths: ending -> kernel -> weight."""

    def put(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        make = next((make for end, make in weights.items() if name.endswith(end)), Frozen)
        return make(leaf)

    return jax.tree_util.tree_map_with_path(put, params)


def lora(rank, alpha):
    draw = np.random.default_rng(rank).standard_normal
    array = lambda *shape: jnp.asarray(draw(shape), jnp.float32)
    return lambda w: LoraWeight(w, array(w.shape[0], rank), array(rank, w.shape[1]), float(alpha))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_comes_back_and_is_by_llama_cpps_rule_the_merged_model(tmp_path, name):
    model, params, _ = model_of(name)
    alpha = 6 if name == "llama" else 0  # 0: GPT-2's B of zeros, where llama.cpp would take 1
    weights = {"query/kernel": lora(2, 8), "key/kernel": lora(2, 8), "up/kernel": lora(3, alpha)}
    adapted = with_weights(params, weights)
    save_gguf_adapter(tmp_path / "a.gguf", model.config, adapted)
    read = load_gguf_adapter(tmp_path / "a.gguf", model.config, params)
    chex.assert_trees_all_close(merge(read), merge(adapted), atol=1e-4)
    # W + alpha / R B A, in the rows of the tensors of a whole file.
    save_gguf(tmp_path / "base.gguf", model, params, kind="f32")
    save_gguf(tmp_path / "merged.gguf", model, adapted, kind="f32")
    file, base, merged = (gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in ("a", "base", "merged"))
    table = lambda reader: {t.name: np.array(t.data) for t in reader.tensors}
    parts, base, merged = map(table, (file, base, merged))
    alpha = file.get_field("adapter.lora.alpha").contents()
    for kernel in {key.rsplit(".", 1)[0] for key in parts}:
        a, b = parts.pop(f"{kernel}.lora_a"), parts.pop(f"{kernel}.lora_b")
        expected = base.pop(kernel) + alpha / len(a) * b @ a
        np.testing.assert_allclose(merged.pop(kernel), expected, atol=1e-4)
    chex.assert_trees_all_equal(merged, base)
    other, others, _ = model_of("qwen3")
    with pytest.raises(
        AdapterError, match="general.architecture is '(llama|gpt2)', expected 'qwen3'"
    ):
        load_gguf_adapter(tmp_path / "a.gguf", other.config, others)


def test_what_llama_cpps_lora_files_cannot_hold_is_named(tmp_path):
    model, params, _ = model_of("llama")
    file = tmp_path / "a.gguf"
    save = lambda weights: save_gguf_adapter(file, model.config, with_weights(params, weights))
    dora = lambda w: DoraWeight(w, jnp.ones((len(w), 2)), jnp.ones((2, w.shape[1])), w[0])
    with pytest.raises(AdapterError, match="llama.cpp supports only LoRA, the params have DoRA"):
        save({"query/kernel": dora})
    with pytest.raises(AdapterError, match="'model.layers.0.input_layernorm.weight' trains too"):
        save({"query/kernel": lora(2, 4), "attention_norm/scale": jnp.asarray})
    save({"query/kernel": lora(2, 4)})
    with pytest.raises(CheckpointError, match="general.type is 'adapter', expected a model"):
        load_model(file)
    smaller = dataclasses.replace(model.config, num_heads=2)
    shapes = layer_shapes(Decoder(smaller))
    with pytest.raises(AdapterError, match=r"lora_a \(2, 32\) and .lora_b \(32, 2\) do not fit"):
        load_gguf_adapter(file, smaller, shapes)
