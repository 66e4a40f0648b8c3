"""config.json of GPT-2."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models import gguf
from jaxft.models.config import DecoderConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader, Json
from jaxft.models.hf_config import read_activation

READS = frozenset(
    "vocab_size n_embd n_inner n_layer n_head n_positions layer_norm_epsilon activation_function "
    "tie_word_embeddings scale_attn_by_inverse_layer_idx reorder_and_upcast_attn".split()
)

# What no file says.
SHARED: dict[str, Any] = {
    "norm": "layer",
    "gated_mlp": False,
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "rope": None,
    "learned_positions": True,
    "family": "gpt2",
}
GGUF_READS = gguf.SHARED_READS | {"attention.layer_norm_epsilon"}


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json.

    Raises:
        CheckpointError: for options that jaxft does not have.
    """
    width = json["n_embd"]
    if json.get("scale_attn_by_inverse_layer_idx") or json.get("reorder_and_upcast_attn"):
        raise CheckpointError("gpt2: scale_attn_by_inverse_layer_idx is not supported.")
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        hidden_size=width,
        intermediate_size=json.get("n_inner") or 4 * width,
        num_layers=json["n_layer"],
        num_heads=json["n_head"],
        num_kv_heads=json["n_head"],
        head_dim=width // json["n_head"],
        max_length=json.get("n_positions", 1024),
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        activation=read_activation(json.get("activation_function", "gelu_new")),
        tie_embeddings=json.get("tie_word_embeddings", True),
        **SHARED,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig."""
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
    }


def read_gguf(header: GgufHeader) -> DecoderConfig:
    """The DecoderConfig of a GGUF file."""
    need = lambda key: gguf.need(header, key)
    width, heads = need("embedding_length"), need("attention.head_count")
    groups = gguf.one(header, "attention.head_count_kv")
    if groups not in (None, heads):
        raise CheckpointError(f"{header.file}: gpt2 with {groups} key heads for {heads} heads.")
    return DecoderConfig(
        vocab_size=gguf.vocabulary(header),
        hidden_size=width,
        intermediate_size=need("feed_forward_length"),
        num_layers=need("block_count"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_length=need("context_length"),
        norm_eps=gguf.decimal(need("attention.layer_norm_epsilon")),
        activation="gelu_tanh",
        tie_embeddings=not header.has("output.weight"),
        **SHARED,
    )


def write_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a DecoderConfig."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_epsilon": float(config.norm_eps),
    }
