"""Hugging Face's config.json of Llama-like decoders <-> DecoderConfig: what families share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from jaxft.models import names
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import HuggingFace, Json
from jaxft.models.hf_keys import COMMON, Keys, check_multiple

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
    "relu": "relu",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
Windows = tuple[int | None, ...]
_ROPE_NUMBERS = {  # rope_type -> the numbers that it needs, and the fields of a Rope that hold them
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_length",
    },
    "yarn": {"factor": "factor", "original_max_position_embeddings": "original_max_length"},
}
_YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
ACTIVATIONS = {  # the inverse
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
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
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        intermediate_size=json["intermediate_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if json["num_key_value_heads"] is None else json["num_key_value_heads"],
        head_dim=head_dim,
        max_length=_usable_length(json["max_position_embeddings"], rope),
        norm_eps=json["rms_norm_eps"],
        activation=read_activation(activation),
        rope=rope,
        tie_embeddings=json["tie_word_embeddings"],
        family=family,
    )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig; the inverse of `read_decoder`.

    Raises:
        CheckpointError: for rotary factors, which only GGUF files can hold.
    """
    if config.rope.factors:
        raise CheckpointError(
            "this model's rotary factors came from a GGUF file and config.json cannot hold them; "
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
    } | _write_rope(config.rope)


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
        kinds = [_SLIDING if local(i) else _FULL for i in range(layers)]
    if len(kinds) != layers or not all(kind in (_FULL, _SLIDING) for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}, expected one of {_FULL!r} and {_SLIDING!r} for each of "
            f"the {layers} layers."
        )
    if _SLIDING not in kinds:
        return ()
    if window is None or window < 1:
        raise CheckpointError(
            f"config.json: layers with {_SLIDING} need a sliding_window, got {window!r}; give its tokens, or "
            f"make layer_types {_FULL!r} (Qwen also needs use_sliding_window: true)."
        )
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """The keys of the windows."""
    window = next((w for w in config.windows if w is not None), None)
    kinds = [_FULL if config.window(i) is None else _SLIDING for i in range(config.num_layers)]
    return {"sliding_window": window, "layer_types": kinds}


def read_rope(json: Json) -> Rope:
    """The rotary positions of all layers. `rope_scaling` overrides `rope_parameters`, as in transformers.

    Raises:
        CheckpointError: for a scaling that jaxft does not support, or positions that differ by layer.
    """
    parameters = json["rope_scaling"] or json["rope_parameters"] or {}
    if not {_FULL, _SLIDING}.isdisjoint(parameters):
        raise CheckpointError("rope_parameters that differ by layer are supported for gemma3 only.")
    original = json["original_max_position_embeddings"]
    if original is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    return read_rope_parameters(parameters, json["max_position_embeddings"], json["rope_theta"])


def read_rope_parameters(parameters: Json, length: int, theta: float | None) -> Rope:
    """The Rope of one set of parameters, in the form of transformers 4 or 5.

    Args:
        parameters: of `rope_scaling` or `rope_parameters`.
        length: max_position_embeddings.
        theta: for parameters without it.

    Raises:
        CheckpointError: for a scaling that jaxft does not support, or missing numbers.
    """
    get = parameters.get
    kind = get("rope_type", get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        hint = (
            " Up to max_position_embeddings tokens, it is none: null." if kind == "dynamic" else ""
        )
        known = ", ".join(_ROPE_NUMBERS)
        raise CheckpointError(
            f"config.json: unsupported rope scaling {kind!r} (rope_type of rope_scaling or rope_parameters); "
            f"known: {known}.{hint}"
        )
    if get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {get('partial_rotary_factor')!r}; jaxft rotates whole "
            "heads (1.0)."
        )
    numbers = {"rope_theta": theta, "original_max_position_embeddings": length, **parameters}
    if kind == "yarn" and "factor" in numbers and numbers["factor"] is None:
        numbers["factor"] = length / (numbers["original_max_position_embeddings"] or length)
    optional = [name for name in _YARN_NUMBERS if kind == "yarn" and parameters.get(name)]
    for name in ("rope_theta", *_ROPE_NUMBERS[kind], *optional):
        value = numbers.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise CheckpointError(
                f"config.json: rope scaling {kind!r} has {name}: {value!r}, expected a positive number."
            )
    found = {ours: numbers[name] for name, ours in _ROPE_NUMBERS[kind].items()}
    yarn = _read_yarn(parameters, numbers["factor"]) if kind == "yarn" else {}
    return Rope(theta=float(numbers["rope_theta"]), scaling=kind, **found, **yarn)


def write_rope_parameters(rope: Rope) -> dict[str, Any]:
    """The parameters of one Rope, in transformers 5's form."""
    json = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    json |= {name: getattr(rope, ours) for name, ours in _ROPE_NUMBERS[rope.scaling].items()}
    if rope.scaling == "yarn":
        json |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        json |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
    return json


def _read_yarn(parameters: Json, factor: float) -> dict[str, Any]:
    """YaRN's own numbers; 0 and null mean the defaults of beta_fast and beta_slow, as in transformers."""
    get = parameters.get
    attention = get("attention_factor")
    if attention is None and get("mscale") and get("mscale_all_dim"):
        # DeepSeek: arxiv.org/abs/2405.04434.
        grown = lambda scale: 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
        attention = grown(get("mscale")) / grown(get("mscale_all_dim"))
    return {
        "attention_factor": attention,
        "beta_fast": get("beta_fast") or 32.0,
        "beta_slow": get("beta_slow") or 1.0,
        "truncate": bool(get("truncate", True)),
    }


def _usable_length(length: int, rope: Rope) -> int:
    """The number of positions: max_position_embeddings, which YaRN's files may leave unscaled."""
    if rope.scaling != "yarn":
        return length
    return max(length, math.floor(rope.factor * rope.original_max_length))


def _write_rope(rope: Rope) -> dict[str, Any]:
    """Both forms: transformers 5 reads `rope_parameters`, earlier versions `rope_theta` and scaling."""
    main = write_rope_parameters(rope)
    scaling = {k: v for k, v in main.items() if k != "rope_theta"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else scaling,
        "rope_parameters": main,
    }
