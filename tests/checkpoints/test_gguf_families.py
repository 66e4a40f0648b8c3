"""GGUF files of every family, written as llama.cpp's converter does, against transformers' models."""

import math

import chex
import gguf
import jax
import numpy as np
import pytest

from jaxft.checkpoints import load_model
from jaxft.checkpoints.assemble import disassemble
from jaxft.checkpoints.gguf import GgufFile
from jaxft.models import family_of

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=12, sliding_window=4)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GEMMA3 = {
    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}
# llama.cpp's name of the architecture, the config.
FAMILIES = {
    "llama": ("llama", lambda: hf.LlamaConfig(**BASE)),
    "llama3.1": ("llama", lambda: hf.LlamaConfig(**BASE, rope_parameters=LLAMA3)),
    "qwen2": ("qwen2", lambda: hf.Qwen2Config(**BASE, tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: hf.Qwen3Config(**BASE, head_dim=128)),
    "gemma2": (
        "gemma2",
        lambda: hf.Gemma2Config(
            **BASE, **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        ),
    ),
    "gemma3": (
        "gemma3",
        lambda: hf.Gemma3TextConfig(
            **BASE | {"num_hidden_layers": 7},  # the sixth sees all, as in every file
            **GEMMA,
            layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            rope_parameters=GEMMA3,
        ),
    ),
}


def random_model(config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"  # the only one with Gemma 2's soft cap
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            centre = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return model


def rope_factors(rope, size):
    """The tensor that llama.cpp's converter writes for Llama 3.1: divisors of the frequencies."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / size)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write(path, model, architecture):
    """The model as a GGUF file; the tensors' names are the gguf package's."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("random")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture != "llama":
        writer.add_key_length(getattr(config, "head_dim", config.hidden_size // 4))
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(rope, 8))
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensor.numpy()
        for part, heads in (
            ("q_proj.w", config.num_attention_heads),
            ("k_proj.w", config.num_key_value_heads),
        ):
            if architecture == "llama" and part in name:
                rows, columns = tensor.shape
                tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
                tensor = tensor.reshape(rows, columns)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """(torch model, GGUF file, our model, our params)."""
    architecture, config = FAMILIES[request.param]
    theirs = random_model(config())
    file = tmp_path_factory.mktemp(request.param) / "model.gguf"
    write(file, theirs, architecture)
    return theirs, file, *load_model(file)


def test_logits_equal_those_of_the_model_that_was_written(pair):
    theirs, _, model, params = pair
    tokens = np.random.default_rng(0).integers(3, 61, (2, 40))  # past windows and Llama's 16
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    got = jax.jit(lambda p, t: model.apply({"params": p}, t).logits)(params, tokens)
    # float32 through a few layers.
    chex.assert_trees_all_close(
        np.asarray(got), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


def test_weights_equal_those_that_transformers_reads(pair):
    _, file, model, params = pair
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    expected = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    ours = dict(disassemble(family_of(model.config).huggingface.entries(model.config), params))
    chex.assert_trees_all_equal(ours, expected)


@pytest.mark.parametrize("architecture, layers", [("gemma2", 46), ("gemma3", 62)])
def test_the_27b_gemmas_scale_by_hidden_size_over_heads(tmp_path, architecture, layers):
    config = FAMILIES[architecture][1]()
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(config)
    empty = empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.zero_()  # What lay in memory may be no number, of which torch warns.
    write(tmp_path / "model.gguf", empty, architecture)
    assert GgufFile(tmp_path / "model.gguf").config.scale == (32 // 4) ** -0.5
