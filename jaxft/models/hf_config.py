"""Hugging Face's config.json of Llama-like decoders <-> DecoderConfig: what families share.

Defaults are those of transformers' configuration classes, which files may leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxft.models import names
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import HuggingFace, Json

# The codec of a decoder whose tensors have Llama's names: a family adds its class and its config.json.
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
    "relu": "relu",
}
ACTIVATIONS = {  # the other way
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

READS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps hidden_act attention_bias mlp_bias "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters".split()
)
WINDOW_READS = frozenset({"sliding_window", "layer_types"})


def read_decoder(json: Json, family: str, rope: Rope | None = None) -> DecoderConfig:
    """The DecoderConfig of a config.json that has nothing but what Llama's has (the keys `READS`).

    `rope` is of the layers without a window; None: that of `read_rope`.
    """
    heads = json["num_attention_heads"]
    bias = json.get("attention_bias", False)
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        intermediate_size=json["intermediate_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=json.get("num_key_value_heads") or heads,
        head_dim=json.get("head_dim") or json["hidden_size"] // heads,
        max_length=json.get("max_position_embeddings", 2048),
        norm_eps=json.get("rms_norm_eps", 1e-6),
        activation=read_activation(json.get("hidden_act", "silu")),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=json.get("mlp_bias", False),
        rope=read_rope(json) if rope is None else rope,
        tie_embeddings=json.get("tie_word_embeddings", False),
        family=family,
    )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig; the inverse of `read_decoder`.

    Raises:
        CheckpointError: for rotary factors, which GGUF files alone can hold.
    """
    if config.rope.factors:
        raise CheckpointError(
            "this model's rotary factors came from a GGUF file and have no place in config.json; "
            "load the Hugging Face checkpoint instead."
        )
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    } | _write_rope(config.rope)


def read_activation(name: str) -> str:
    """Our name of Hugging Face's activation.

    Raises:
        CheckpointError: for one that jaxft does not have.
    """
    if name not in _ACTIVATION_NAMES:
        raise CheckpointError(
            f"unsupported activation {name!r}; supported: {', '.join(_ACTIVATION_NAMES)}."
        )
    return _ACTIVATION_NAMES[name]


def read_windows(json: Json, local: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The windows of the layers; keys `WINDOW_READS`.

    `local` says which layers have one in files that are older than `layer_types`.
    """
    window = json.get("sliding_window")
    if window is None:
        return ()
    kinds = json.get("layer_types")
    if kinds is None:
        found = [local(i) for i in range(json["num_hidden_layers"])]
    else:
        found = [kind == "sliding_attention" for kind in kinds]
    return tuple(window if has else None for has in found) if any(found) else ()


def write_windowed_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The keys of `write_decoder` and of `write_windows`: Mistral's and Qwen's."""
    return write_decoder(config) | write_windows(config)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """The keys of the windows."""
    window = next((w for w in config.windows if w is not None), None)
    kind = lambda i: "full_attention" if config.window(i) is None else "sliding_attention"
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": [kind(i) for i in range(config.num_layers)],
    }


def read_rope(json: Json, theta: float = 1e4) -> Rope:
    """The rotary positions of all layers; `theta` is the default of `rope_theta`.

    Raises:
        CheckpointError: for a scaling that jaxft does not have, or positions that differ by layer.
    """
    parameters = json.get("rope_parameters") or json.get("rope_scaling") or {}
    if "full_attention" in parameters:
        raise CheckpointError("rope_parameters that differ by layer are supported for gemma3 only.")
    return read_rope_parameters(parameters, json, json.get("rope_theta", theta))


def read_rope_parameters(parameters: Json, json: Json, theta: float) -> Rope:
    """The Rope of one set of parameters, in the form of transformers 4 or 5.

    Raises:
        CheckpointError: for a scaling that jaxft does not have.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise CheckpointError(f"unsupported rope scaling {kind!r}; known: linear, llama3, yarn.")
    length = parameters.get("original_max_position_embeddings")
    optional = {
        name: parameters[name]
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate")
        if parameters.get(name) is not None
    }
    return Rope(
        theta=float(parameters.get("rope_theta", theta)),
        scaling=kind,
        factor=float(parameters.get("factor", 1.0)),
        original_max_length=length or json.get("max_position_embeddings", 8192),
        attention_factor=parameters.get("attention_factor"),
        **optional,
    )


def write_rope_parameters(rope: Rope) -> dict[str, Any]:
    """The parameters of one Rope, as transformers 5 has them."""
    json = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        json["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        json["original_max_position_embeddings"] = rope.original_max_length
    if rope.scaling == "llama3":
        json["low_freq_factor"] = rope.low_freq_factor
        json["high_freq_factor"] = rope.high_freq_factor
    if rope.scaling == "yarn":
        json |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        json |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
    return json


def _write_rope(rope: Rope) -> dict[str, Any]:
    """Both forms: transformers 5 reads `rope_parameters`, earlier ones `rope_theta` and scaling."""
    main = write_rope_parameters(rope)
    scaling = {k: v for k, v in main.items() if k != "rope_theta"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else scaling,
        "rope_parameters": main,
    }
