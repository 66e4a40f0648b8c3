"""Hugging Face's config.json of Llama-like decoders <-> DecoderConfig: what families share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxft.models import names
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import HuggingFace, Json
from jaxft.models.hf_keys import COMMON, Keys, check_multiple
from jaxft.models.hf_rope import (
    FULL,
    SLIDING,
    check_factors,
    read_rope,
    usable_length,
    write_rope,
    written_length,
)

# The codec of a decoder whose tensors have Llama's names; a family adds its class and its config.json.
decoder_codec = functools.partial(
    HuggingFace,
    entries=names.decoder_entries,
    rename=names.with_prefix("model."),
    ignores=names.decoder_ignores,
)

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
Windows = tuple[int | None, ...]
ACTIVATIONS = {  # the inverse
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

READS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
    "rope_theta rope_scaling rope_parameters original_max_position_embeddings".split()
)
WINDOW_READS = frozenset({"sliding_window", "layer_types"})
# The common keys of transformers' classes of decoders, without sizes.
DEFAULTS: dict[str, Any] = COMMON | {
    "vocab_size": 32000,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": None,
    "is_causal": True,
}


def decoder_keys(*nullable: str, **defaults: Any) -> Keys:
    """The keys of a decoder's class: `DEFAULTS`, with the class's additions and changes."""
    neutral = {"partial_rotary_factor": (1.0,)}
    return Keys(DEFAULTS | defaults, frozenset({"rope_theta", *nullable}), neutral=neutral)


def sizes(hidden: int, intermediate: int, layers: int, heads: int, length: int) -> dict[str, int]:
    """The sizes in a config.json: width, width of the MLP, layers, heads and positions."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
    }


def read_decoder(
    json: Json, family: str, activation: str, rope: Rope | None = None
) -> DecoderConfig:
    """The DecoderConfig of a config.json that only has the keys `READS`.

    Args:
        json: the file, with defaults for absent keys.
        family: the config's.
        activation: the value of the key that names it.
        rope: of the layers without a window; None: that of `read_rope`.
    """
    heads, rope = json["num_attention_heads"], read_rope(json) if rope is None else rope
    check_multiple(json, "num_attention_heads", "num_key_value_heads")
    head_dim = json["hidden_size"] // heads if json["head_dim"] is None else json["head_dim"]
    if head_dim < 1 or head_dim % 2:
        raise CheckpointError(
            f"config.json: head_dim, or hidden_size over num_attention_heads, is {head_dim}; expected an "
            "even number, since rotary positions turn pairs of features."
        )
    check_factors(rope, head_dim)
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        intermediate_size=json["intermediate_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if json["num_key_value_heads"] is None else json["num_key_value_heads"],
        head_dim=head_dim,
        max_length=usable_length(json["max_position_embeddings"], rope),
        norm_eps=json["rms_norm_eps"],
        activation=read_activation(activation),
        rope=rope,
        tie_embeddings=json["tie_word_embeddings"],
        family=family,
    )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig; the inverse of `read_decoder`.

    Raises:
        CheckpointError: for rotary factors of a GGUF file, which config.json cannot hold.
    """
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": written_length(config.max_length, config.rope),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATIONS[config.activation],
    } | write_rope(config.rope)


def read_activation(name: str) -> str:
    """jaxft's name of Hugging Face's activation.

    Raises:
        CheckpointError: for one that jaxft does not support.
    """
    if name not in _ACTIVATION_NAMES:
        raise CheckpointError(
            f"config.json: unsupported activation {name!r} (hidden_act, hidden_activation or "
            f"activation_function); supported: {', '.join(_ACTIVATION_NAMES)}."
        )
    return _ACTIVATION_NAMES[name]


def read_windows(json: Json, window: int | None, local: Callable[[int], bool]) -> Windows:
    """The windows of the layers, from the key `layer_types`, or from `local` in files without it.

    Args:
        json: the file.
        window: tokens that a layer with a window sees, including the query's own.
        local: whether a layer has a window.

    Raises:
        CheckpointError: for unsupported kinds of layers, too many or too few of them, or windows
            without a size.
    """
    layers, kinds = json["num_hidden_layers"], json["layer_types"]
    if kinds is None:
        kinds = [SLIDING if local(i) else FULL for i in range(layers)]
    if len(kinds) != layers or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}, expected one of {FULL!r} and {SLIDING!r} for each of "
            f"the {layers} layers."
        )
    if SLIDING not in kinds:
        return ()
    if window is None or window < 1:
        raise CheckpointError(
            f"config.json: layers with {SLIDING} need a sliding_window, got {window!r}; give its tokens, or "
            f"make layer_types {FULL!r} (Qwen also needs use_sliding_window: true)."
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """The keys of the windows."""
    window = next((w for w in config.windows if w is not None), None)
    kinds = [FULL if config.window(i) is None else SLIDING for i in range(config.num_layers)]
    return {"sliding_window": window, "layer_types": kinds}
