"""Metadata and tensor names of GGUF files that Llama-like decoders share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader
from jaxft.models.names import Entry

READS = frozenset(
    "attention.head_count attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon "
    "block_count context_length embedding_length feed_forward_length rope.dimension_count "
    "rope.freq_base rope.scaling.factor rope.scaling.type".split()
)
NORMS = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
QK_NORMS = {"attn_q_norm": "attention/query_norm", "attn_k_norm": "attention/key_norm"}


def read_gguf_decoder(header: GgufHeader, family: str) -> DecoderConfig:
    """The DecoderConfig of a file that has nothing but what Llama's have (the keys `READS`)."""
    get = header.get
    heads, width = get("attention.head_count"), get("embedding_length")
    return DecoderConfig(
        vocab_size=int(header.read("token_embd.weight").shape[0]),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length") or get("rope.dimension_count") or width // heads,
        max_length=get("context_length", 2048),
        # Stored in float32: 1e-5 comes back as 9.99999975e-06, its decimal is meant.
        norm_eps=float(
            np.format_float_positional(np.float32(get("attention.layer_norm_rms_epsilon")))
        ),
        rope=_rope(header),
        tie_embeddings=not header.has("output.weight"),
        family=family,
    )


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
        norms: name in the file -> path in a block, of the norms of each layer.
        permuted: whether rows of queries and keys are in llama.cpp's rotary order.
        offset: added to the scales of norms in the file.
    """
    entries = [Entry("token_embd.weight", ("embed/embedding",))]
    linear = {
        "attn_q": ("attention/query", config.num_heads if permuted else 0),
        "attn_k": ("attention/key", config.num_kv_heads if permuted else 0),
        "attn_v": ("attention/value", 0),
        "attn_output": ("attention/out", 0),
        "ffn_gate": ("mlp/gate", 0),
        "ffn_up": ("mlp/up", 0),
        "ffn_down": ("mlp/down", 0),
    }
    for i in range(config.num_layers):
        theirs, ours = f"blk.{i}.", f"layers/{i}/"
        for name, (path, heads) in linear.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True, heads))
            if config.attention_bias and name in ("attn_q", "attn_k", "attn_v"):
                entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",)))
        for name, path in norms.items():
            scale = (f"{ours}{path}/scale",)
            entries.append(Entry(f"{theirs}{name}.weight", scale, offset=offset))
    entries.append(Entry("output_norm.weight", ("final_norm/scale",), offset=offset))
    if not config.tie_embeddings:
        entries.append(Entry("output.weight", ("head/kernel",), True))
    return entries


def _rope(header: GgufHeader) -> Rope:
    get = header.get
    theta = float(get("rope.freq_base", 10_000.0))
    if header.has("rope_freqs.weight"):
        factors = header.read("rope_freqs.weight")[...]
        return Rope(theta=theta, factors=tuple(map(float, factors)))
    kind = get("rope.scaling.type", "none")
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(get("rope.scaling.factor", 1.0)))
    if kind != "none":
        raise CheckpointError(f"{header.file}: unsupported rope scaling {kind!r}.")
    return Rope(theta=theta)
