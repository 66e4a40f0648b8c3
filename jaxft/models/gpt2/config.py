"""config.json of GPT-2."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models import gguf
from jaxft.models.config import DecoderConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader, Json
from jaxft.models.hf_config import read_activation
from jaxft.models.hf_keys import COMMON, Keys, check_multiple

READS = frozenset(
    "vocab_size n_embd n_inner n_layer n_head n_positions layer_norm_epsilon activation_function "
    "tie_word_embeddings scale_attn_weights".split()
)
KEYS = Keys(
    COMMON
    | {
        "vocab_size": 50257,
        "n_embd": 768,
        "n_inner": None,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "is_causal": True,
    },
    no_effect=frozenset({"reorder_and_upcast_attn"}),  # scores are float32 here in any case
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)

# Properties that no file contains.
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
    """The DecoderConfig of a config.json."""
    check_multiple(json, "n_embd", "n_head")
    width, inner = json["n_embd"], json["n_inner"]
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        hidden_size=width,
        intermediate_size=4 * width if inner is None else inner,
        num_layers=json["n_layer"],
        num_heads=json["n_head"],
        num_kv_heads=json["n_head"],
        head_dim=width // json["n_head"],
        max_length=json["n_positions"],
        norm_eps=json["layer_norm_epsilon"],
        activation=read_activation(json["activation_function"]),
        attention_scale=None if json["scale_attn_weights"] else 1.0,
        tie_embeddings=json["tie_word_embeddings"],
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
        "scale_attn_weights": config.attention_scale is None,
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
