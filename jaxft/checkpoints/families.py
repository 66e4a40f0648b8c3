"""Hugging Face's config.json of each decoder family <-> DecoderConfig.

Defaults are those of transformers' configuration classes, which files may leave out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxft.checkpoints.errors import CheckpointError
from jaxft.models import DecoderConfig, Rope

Json = Mapping[str, Any]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

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


def decoder_config(json: Json) -> DecoderConfig:
    """The DecoderConfig of a config.json.

    Raises:
        CheckpointError: for an architecture that jaxft does not have.
    """
    family = json.get("model_type")
    if family not in ARCHITECTURES:
        raise CheckpointError(
            f"unsupported architecture: model_type is {family!r}; supported: "
            f"{', '.join(ARCHITECTURES)}, bert, roberta, vit."
        )
    if family == "gpt2":
        return _gpt2(json)
    config = _common(json, family)
    if family in ("gemma", "gemma2", "gemma3_text"):
        config = _gemma(json, config)
    return config


def hf_config(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a DecoderConfig; the inverse of `decoder_config`."""
    if config.rope is not None and config.rope.factors:
        raise CheckpointError(
            "this model's rotary factors came from a GGUF file and have no place in config.json; "
            "load the Hugging Face checkpoint instead."
        )
    common = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return common | (_gpt2_json(config) if config.family == "gpt2" else _common_json(config))


def _common(json: Json, family: str) -> DecoderConfig:
    heads = json["num_attention_heads"]
    layers = json["num_hidden_layers"]
    qwen3_or_gemma = family in ("qwen3", "gemma", "gemma2", "gemma3_text")
    size = json.get("head_dim") or _head_dim(family) or json["hidden_size"] // heads
    bias = json.get("attention_bias", False)
    main, local = _ropes(json, family)
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        intermediate_size=json["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=json.get("num_key_value_heads") or heads,
        head_dim=size,
        max_length=json.get("max_position_embeddings", 2048),
        norm_eps=json.get("rms_norm_eps", 1e-6),
        activation=activation(json.get("hidden_act", "silu")),
        attention_bias=True if family == "qwen2" else bias,
        output_bias=bias if family != "qwen2" else False,
        mlp_bias=json.get("mlp_bias", False),
        qk_norm=family in ("qwen3", "gemma3_text"),
        rope=main,
        local_rope=local,
        windows=_windows(json, family, layers),
        tie_embeddings=json.get("tie_word_embeddings", qwen3_or_gemma and family != "qwen3"),
        family=family,
    )


def _gemma(json: Json, config: DecoderConfig) -> DecoderConfig:
    later = config.family != "gemma"
    return dataclasses.replace(
        config,
        norm_offset=1.0,
        activation=activation(json.get("hidden_activation") or "gelu_pytorch_tanh"),
        embedding_scale=config.hidden_size**0.5,
        post_norms=later,
        attention_scale=json.get("query_pre_attn_scalar", 256) ** -0.5 if later else None,
        attention_softcap=json.get("attn_logit_softcapping"),
        final_softcap=json.get("final_logit_softcapping"),
    )


def _gpt2(json: Json) -> DecoderConfig:
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
        norm="layer",
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        activation=activation(json.get("activation_function", "gelu_new")),
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        rope=None,
        learned_positions=True,
        tie_embeddings=json.get("tie_word_embeddings", True),
        family="gpt2",
    )


def activation(name: str) -> str:
    """Our name of Hugging Face's activation.

    Raises:
        CheckpointError: for one that jaxft does not have.
    """
    if name not in _ACTIVATION_NAMES:
        raise CheckpointError(
            f"unsupported activation {name!r}; supported: {', '.join(_ACTIVATION_NAMES)}."
        )
    return _ACTIVATION_NAMES[name]


def _head_dim(family: str) -> int | None:
    return {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}.get(family)


def _windows(json: Json, family: str, layers: int) -> tuple[int | None, ...]:
    window = json.get("sliding_window")
    if family in ("gemma", "llama") or window is None:
        return ()
    kinds = json.get("layer_types")
    if kinds is None:
        kinds = [_layer_type(json, family, i) for i in range(layers)]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _layer_type(json: Json, family: str, layer: int) -> str:
    """Which layers have a window, for files older than `layer_types`."""
    if family == "mistral":
        local = True
    elif family in ("qwen2", "qwen3"):
        local = json.get("use_sliding_window", False) and layer >= json.get("max_window_layers", 28)
    elif family == "gemma2":
        local = layer % 2 == 0
    else:
        local = (layer + 1) % json.get("sliding_window_pattern", 6) != 0
    return "sliding_attention" if local else "full_attention"


def _ropes(json: Json, family: str) -> tuple[Rope, Rope | None]:
    parameters = json.get("rope_parameters") or {}
    default = {"gemma3_text": 1e6}.get(family, 1e4)
    if "full_attention" in parameters:
        parts = [parameters["full_attention"], parameters["sliding_attention"]]
        return _rope(parts[0], json, default), _rope(parts[1], json, 1e4)
    main = _rope(
        parameters or json.get("rope_scaling") or {}, json, json.get("rope_theta", default)
    )
    if family == "gemma3_text":
        return main, Rope(theta=float(json.get("rope_local_base_freq", 1e4)))
    return main, None


def _rope(parameters: Json, json: Json, theta: float) -> Rope:
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


def _common_json(config: DecoderConfig) -> dict[str, Any]:
    json = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias and config.family != "qwen2",
        "mlp_bias": config.mlp_bias,
    }
    json |= _rope_json(config)
    if config.family not in ("llama", "gemma"):
        window = next((w for w in config.windows if w is not None), None)
        kind = lambda i: "full_attention" if config.window(i) is None else "sliding_attention"
        json["sliding_window"] = window
        json["use_sliding_window"] = window is not None
        json["layer_types"] = [kind(i) for i in range(config.num_layers)]
    if config.family.startswith("gemma"):
        json["hidden_activation"] = ACTIVATIONS[config.activation]
        json["attn_logit_softcapping"] = config.attention_softcap
        json["final_logit_softcapping"] = config.final_softcap
        json["query_pre_attn_scalar"] = round(config.scale**-2)
    return json


def _rope_json(config: DecoderConfig) -> dict[str, Any]:
    """Both forms: transformers 5 reads `rope_parameters`, earlier ones `rope_theta` and scaling."""
    main = _rope_parameters(config.rope)
    scaling = {k: v for k, v in main.items() if k != "rope_theta"}
    old = {
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.scaling == "default" else scaling,
    }
    if config.local_rope is None:
        return old | {"rope_parameters": main}
    local = _rope_parameters(config.local_rope)
    both = {"full_attention": main, "sliding_attention": local}
    return old | {"rope_local_base_freq": config.local_rope.theta, "rope_parameters": both}


def _rope_parameters(rope: Rope) -> dict[str, Any]:
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


def _gpt2_json(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
    }
