"""Reads and writes metadata and tensor names of GGUF files that Llama-like decoders share.

Present and absent keys mean the same as in llama.cpp (src/llama-model.cpp and src/models there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader
from jaxft.models.names import Entry
from jaxft.models.rope import rope_frequencies

ROPE_READS = frozenset(
    "rope.freq_base rope.scaling.type rope.scaling.factor rope.scale_linear rope.scaling.attn_factor "
    "rope.scaling.original_context_length rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor".split()
)
SHARED_READS = frozenset(
    "attention.head_count attention.head_count_kv block_count context_length embedding_length "
    "feed_forward_length vocab_size".split()
)
READS = (
    ROPE_READS
    | SHARED_READS
    | {
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "rope.dimension_count",
    }
)
NORMS = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
QK_NORMS = {"attn_q_norm": "attention/query_norm", "attn_k_norm": "attention/key_norm"}
ROPE_FACTORS = "rope_freqs.weight"


def read_gguf_decoder(header: GgufHeader, family: str) -> DecoderConfig:
    """The DecoderConfig of a file that only has Llama's keys (`READS`).

    Raises:
        CheckpointError: for a key that is missing, differs by layer, or needs a feature the decoder lacks.
    """
    heads, width = need(header, "attention.head_count"), need(header, "embedding_length")
    size = int(header.get("attention.key_length") or width // heads)
    for key, part in (("attention.value_length", "values"), ("rope.dimension_count", "rotations")):
        if header.get(key) not in (None, size):
            raise CheckpointError(
                f"{header.file}: {key} is {header.get(key)} for heads of {size}; {part} of another size "
                "than the keys are not supported."
            )
    return DecoderConfig(
        vocab_size=vocabulary(header),
        hidden_size=width,
        intermediate_size=need(header, "feed_forward_length"),
        num_layers=need(header, "block_count"),
        num_heads=heads,
        num_kv_heads=one(header, "attention.head_count_kv") or heads,
        head_dim=size,
        max_length=need(header, "context_length"),
        norm_eps=decimal(need(header, "attention.layer_norm_rms_epsilon")),
        rope=read_rope(header),
        tie_embeddings=not header.has("output.weight"),
        family=family,
    )


def write_gguf_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_gguf_decoder` reads; `jaxft.checkpoints.save_gguf` checks that they suffice."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        **_write_rope(config.rope or Rope()),
    }


def gguf_decoder_entries(
    config: DecoderConfig,
    norms: Mapping[str, str] = NORMS,
    *,
    permuted: bool = False,
    offset: float = 0.0,
) -> list[Entry]:
    """The tensors of a Llama-like decoder.

    Args:
        config: of the model.
        norms: name in the file -> path in a block, for the norms of each layer.
        permuted: whether rows of queries and keys are in llama.cpp's rotary order.
        offset: added to the scales of norms in the file.
    """
    entries = [Entry("token_embd.weight", ("embed/embedding",))]
    linear = {
        "attn_q": ("attention/query", config.num_heads if permuted else 0, config.attention_bias),
        "attn_k": ("attention/key", config.num_kv_heads if permuted else 0, config.attention_bias),
        "attn_v": ("attention/value", 0, config.attention_bias),
        "attn_output": ("attention/out", 0, config.output_bias),
        "ffn_gate": ("mlp/gate", 0, config.mlp_bias),
        "ffn_up": ("mlp/up", 0, config.mlp_bias),
        "ffn_down": ("mlp/down", 0, config.mlp_bias),
    }
    for i in range(config.num_layers):
        theirs, ours = f"blk.{i}.", f"layers/{i}/"
        for name, (path, heads, bias) in linear.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True, heads))
            if bias:
                entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",), False, heads))
        for name, path in norms.items():
            scale = (f"{ours}{path}/scale",)
            entries.append(Entry(f"{theirs}{name}.weight", scale, offset=offset))
    entries.append(Entry("output_norm.weight", ("final_norm/scale",), offset=offset))
    return entries + output_entries(config)


def output_entries(config: DecoderConfig) -> list[Entry]:
    """The output projection, if the embeddings are not tied."""
    return [] if config.tie_embeddings else [Entry("output.weight", ("head/kernel",), True)]


def need(header: GgufHeader, key: str) -> Any:
    """The value of a required key; for keys by layer see `one`."""
    value = one(header, key)
    if value is None:
        raise CheckpointError(
            f"{header.file}: the key {key!r} is missing; convert the model again with llama.cpp."
        )
    return value


def one(header: GgufHeader, key: str) -> Any:
    """The value of a key that may be written once for each layer, or None.

    Raises:
        CheckpointError: if the layers differ.
    """
    value = header.get(key)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(
            f"{header.file}: {key} differs by layer ({value}); layers of different sizes are not supported."
        )
    return value[0]


def vocabulary(header: GgufHeader) -> int:
    """The number of rows of the embeddings, which must equal the key `vocab_size` if present."""
    rows, said = int(header.read("token_embd.weight").shape[0]), header.get("vocab_size")
    if said not in (None, rows):
        raise CheckpointError(
            f"{header.file}: vocab_size is {said}, but token_embd.weight has {rows} rows."
        )
    return rows


def decimal(value: float) -> float:
    """The shortest decimal of a float32: 1e-5 is stored as 9.99999975e-06."""
    return float(np.format_float_positional(np.float32(value)))


def read_rope(header: GgufHeader) -> Rope:
    """The rotary positions of the layers without a window.

    Raises:
        CheckpointError: for a scaling that jaxft does not support.
    """
    get = header.get
    theta = decimal(get("rope.freq_base", 10_000.0))
    # As in llama.cpp: without a type the factor scales linearly, and 0 means no factor.
    kind = get("rope.scaling.type", "linear")
    factor = decimal(get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{header.file}: unsupported rope.scaling.type {kind!r}; known: none, linear, yarn."
        )
    keys = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    attention = math.prod(decimal(get(key, 1.0)) for key in keys)
    mix = get("rope.scaling.yarn_ext_factor", -1.0)
    if kind == "yarn":
        return _read_yarn(header, theta, factor, attention, mix)
    if attention != 1 or mix > 0:
        what = ", ".join(f"{key} {get(key)}" for key in (*keys, "rope.scaling.yarn_ext_factor"))
        raise CheckpointError(
            f"{header.file}: {what} without rope.scaling.type yarn are not supported."
        )
    factor = 1.0 if kind == "none" else factor
    if header.has(ROPE_FACTORS):
        divisors = factor * header.read(ROPE_FACTORS)[...]
        return Rope(theta=theta, factors=tuple(map(float, divisors)))
    return Rope(theta=theta) if factor == 1 else Rope(theta=theta, scaling="linear", factor=factor)


def rope_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """The tensor of divisors of the frequencies, for Llama 3.1's scaling and for files that had one."""
    rope = config.rope
    if not rope.factors and rope.scaling != "llama3":
        return {}
    plain = rope_frequencies(Rope(theta=rope.theta), config.head_dim)
    divisors = plain / rope_frequencies(rope, config.head_dim)
    return {ROPE_FACTORS: divisors.astype(np.float32)}


def _read_yarn(header, theta, factor, attention, mix):
    if header.has(ROPE_FACTORS):
        raise CheckpointError(f"{header.file}: {ROPE_FACTORS} beside YaRN is not supported.")
    if mix >= 0 and mix != 1:
        raise CheckpointError(
            f"{header.file}: rope.scaling.yarn_ext_factor {mix} is not supported; expected 1."
        )
    get = header.get
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_length=int(
            get("rope.scaling.original_context_length") or need(header, "context_length")
        ),
        beta_fast=decimal(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=decimal(get("rope.scaling.yarn_beta_slow", 1.0)),
        # llama.cpp multiplies its factor by the paper's.
        attention_factor=None if attention == 1 else attention * (0.1 * math.log(factor) + 1),
    )


def _write_rope(rope: Rope) -> dict[str, Any]:
    if rope.by_length or rope.share != 1:
        what = f"scaling {rope.scaling!r}" if rope.by_length else "positions in part of a head"
        raise CheckpointError(
            f"GGUF files with rotary {what} are not written; save the model as a Hugging Face directory."
        )
    keys: dict[str, Any] = {"rope.freq_base": float(rope.theta)}
    if rope.scaling in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope.scaling
        keys["rope.scaling.factor"] = float(rope.factor)
    if rope.scaling == "yarn":
        keys["rope.scaling.original_context_length"] = rope.original_max_length
        keys["rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
        if rope.attention_factor is not None:
            usual = 0.1 * math.log(rope.factor) + 1
            keys["rope.scaling.yarn_attn_factor"] = rope.attention_factor / usual
    return keys
