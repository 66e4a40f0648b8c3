"""config.json of Gemma 4's text model."""

from __future__ import annotations

import dataclasses
import math
from collections import ChainMap
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig, Experts, Heads, PerLayer, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_rope import FULL, SLIDING

# The value of an absent per_layer_config; null means something else to transformers.
ABSENT = "global_head_dim and num_global_key_value_heads"
PERIOD = 6  # of layers without a window, if layer_types is absent
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_OF_A_LAYER = ("head_dim", "num_key_value_heads")  # keys that per_layer_config may hold
_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
READS = (hf_config.READS | hf_config.WINDOW_READS) - {
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
} | {
    "hidden_activation",
    "attention_bias",
    "final_logit_softcapping",
    "global_head_dim",
    "num_global_key_value_heads",
    "per_layer_config",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "enable_moe_block",
    *_EXPERTS,
}
_SWITCHES = {
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    **dict.fromkeys(_EXPERTS),
}
KEYS = hf_config.decoder_keys(
    **hf_config.sizes(2304, 9216, 30, 8, 131072),
    **_SWITCHES,
    vocab_size=262144,
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    sliding_window=512,
    layer_types=None,
    final_logit_softcapping=None,
    use_bidirectional_attention=None,
    global_head_dim=512,
    num_global_key_value_heads=None,
    per_layer_config=ABSENT,
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262144,
)
# transformers takes rope_scaling for rope_parameters, and reads rope_theta only within that.
KEYS = dataclasses.replace(
    KEYS,
    defaults={name: KEYS.defaults[name] for name in KEYS.defaults if name != "rope_theta"},
    nullable=KEYS.nullable - {"rope_theta"},
    unchecked=frozenset({"per_layer_config", "rope_parameters"}),
    # "vision" differs for images only.
    neutral={
        **KEYS.neutral,
        "rope_scaling": (None,),
        "use_bidirectional_attention": (None, "vision"),
    },
)


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json.

    Raises:
        CheckpointError: for values that no model can have, and heads that differ within a kind of layers.
    """
    windows = hf_config.read_windows(
        ChainMap({"layer_types": _kinds(json)}, json), json["sliding_window"], _local
    )
    full = _ropes(json, FULL)
    own, wide = _heads(json, windows)
    view = ChainMap({"head_dim": own.size, "num_key_value_heads": own.groups}, json)
    config = hf_config.read_decoder(view, "gemma4_text", json["hidden_activation"], full)
    if wide.size % 2 or config.num_heads % wide.groups:
        raise CheckpointError(
            f"config.json: layers with {FULL!r} have heads of {wide.size} features, {wide.groups} of them "
            f"for keys; expected an even size, and a divisor of num_attention_heads ({config.num_heads})."
        )
    shared, doubled = json["num_kv_shared_layers"], json["use_double_wide_mlp"]
    cap = json["final_logit_softcapping"]
    if cap is not None and not 0 < cap < math.inf:
        raise CheckpointError(
            f"config.json: final_logit_softcapping is {cap}, expected a positive number or null."
        )
    return dataclasses.replace(
        config,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=1.0,
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        qk_norm=True,
        value_norm=True,
        post_norms=True,
        layer_scales=True,
        final_softcap=cap,
        windows=windows,
        local_rope=_ropes(json, SLIDING),
        full_heads=None if wide == own else wide,
        shared_layers=shared,
        shared_width=2 * config.intermediate_size if shared and doubled else None,
        per_layer=_per_layer(json),
        experts=_experts(json),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig."""
    wide, inputs, experts = config.full_heads, config.per_layer, config.experts
    plain = dataclasses.replace(config, rope=Rope())
    json = hf_config.write_decoder(plain) | hf_config.write_windows(config)
    json |= {
        "hidden_activation": json["hidden_act"],
        "rope_parameters": {FULL: _written(config.rope), SLIDING: _written(config.local_rope)},
        "per_layer_config": {},
        "attention_k_eq_v": wide is not None and wide.tied,
        "num_kv_shared_layers": config.shared_layers,
        "use_double_wide_mlp": config.shared_width is not None,
        "hidden_size_per_layer_input": 0 if inputs is None else inputs.size,
        "attention_bias": config.attention_bias,
        "final_logit_softcapping": config.final_softcap,
        "enable_moe_block": experts is not None,
    }
    if wide is not None:
        full = [i for i in range(config.num_layers) if config.window(i) is None]
        sizes = dict(zip(_OF_A_LAYER, (wide.size, wide.groups), strict=True))
        json["per_layer_config"] = {str(i): sizes for i in full}
    if inputs is not None:
        json["vocab_size_per_layer_input"] = inputs.vocab_size
    if experts is not None:
        counts = experts.count, experts.per_token, experts.width
        json |= dict(zip(_EXPERTS, counts, strict=True))
    dropped = ["hidden_act", "rope_theta", "rope_scaling"]
    dropped += [] if any(config.windows) else ["sliding_window"]  # which is an integer in the class
    return {name: json[name] for name in json if name not in dropped}


def _local(layer: int) -> bool:
    return (layer + 1) % PERIOD != 0


def _kinds(json: Json) -> Any:
    """layer_types as transformers' class corrects it: the last layer never has a window."""
    kinds = json["layer_types"]
    if kinds is None:
        kinds = [SLIDING if _local(i) else FULL for i in range(json["num_hidden_layers"])]
    return [*kinds[:-1], FULL] if kinds and kinds[-1] == SLIDING else kinds


def _heads(json: Json, windows: hf_config.Windows) -> tuple[Heads, Heads]:
    """The heads of layers with a window, and of those without."""
    size, groups = (json[name] for name in _OF_A_LAYER)
    tied, by_layer = json["attention_k_eq_v"], json["per_layer_config"]
    if by_layer == ABSENT:
        wide, few = json["global_head_dim"], json["num_global_key_value_heads"]
        # Only with attention_k_eq_v, as in transformers.
        full = wide, few if tied and few is not None else groups
        return Heads(*((size, groups) if windows else full)), Heads(*full, tied)
    layers = json["num_hidden_layers"]
    entries = _entries(by_layer, layers)
    found: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for i in range(layers):
        entry = entries.get(i, {})
        sizes = entry.get(_OF_A_LAYER[0], size), entry.get(_OF_A_LAYER[1], groups)
        found[bool(windows) and windows[i] is not None].add(sizes)
    for local, kind in ((True, SLIDING), (False, FULL)):
        if len(found[local]) > 1:
            raise CheckpointError(
                f"config.json: per_layer_config gives layers with {kind!r} unlike (head_dim, "
                f"num_key_value_heads) {sorted(found[local])}; expected one of each for all of them."
            )
    (full,) = found[False]
    (own,) = found[True] or {full}
    return Heads(*own), Heads(*full, tied)


def _entries(by_layer: Any, layers: int) -> dict[int, dict[str, int]]:
    """per_layer_config by the numbers of layers."""
    number = lambda key: isinstance(key, str) and key.isdecimal() and int(key) < layers
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
    right = isinstance(by_layer, dict) and all(
        number(key)
        and isinstance(entry, dict)
        and set(entry) <= set(_OF_A_LAYER)
        and all(map(whole, entry.values()))
        for key, entry in by_layer.items()
    )
    if not right:
        raise CheckpointError(
            f"config.json: per_layer_config is {by_layer!r:.80}; expected positive head_dim and "
            f'num_key_value_heads, and nothing else, by layer ("0" to "{layers - 1}"); leave it out for '
            "those of global_head_dim and num_global_key_value_heads."
        )
    return {int(key): entry for key, entry in by_layer.items()}


def _ropes(json: Json, kind: str) -> Rope:
    """The rotary positions of a kind of layers.

    Raises:
        CheckpointError: for parameters that transformers' class does not compute, or does not complete.
    """
    both = ROPES if json["rope_parameters"] is None else json["rope_parameters"]
    if not isinstance(both, dict) or set(both) != {FULL, SLIDING}:
        raise CheckpointError(
            f"config.json: rope_parameters of gemma4_text is {both!r:.80}; expected {FULL} and {SLIDING}, "
            "each with its own parameters."
        )
    part = both[kind] if isinstance(both[kind], dict) else {}
    name = part.get("rope_type")
    known = {"rope_type", "rope_theta"}
    known |= {"factor"} if name in ("linear", "proportional") else set()
    known |= {"partial_rotary_factor"} if name == "proportional" else set()
    share, factor = part.get("partial_rotary_factor", 1.0), part.get("factor", 1.0)
    numbers = (part.get("rope_theta"), share, factor)
    right = all(_positive(x) for x in numbers) and share <= 1 and set(part) <= known
    if name not in ("default", "linear", "proportional") or not right:
        raise CheckpointError(
            f"config.json: rope_parameters of gemma4_text have {kind}: {both[kind]!r:.120}; expected "
            "rope_type 'default', 'linear' (with factor) or 'proportional' (with partial_rotary_factor, at "
            "most 1), and rope_theta, all positive numbers."
        )
    if name == "linear" and "factor" not in part:
        raise CheckpointError(f"config.json: rope_parameters have {kind}: linear without factor.")
    return Rope(float(part["rope_theta"]), name, float(share), float(factor))


def _written(rope: Rope) -> dict[str, Any]:
    json: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling == "proportional":
        json["partial_rotary_factor"] = rope.share
    if rope.scaling == "linear" or rope.factor != 1:
        json["factor"] = rope.factor
    return json


def _per_layer(json: Json) -> PerLayer | None:
    size, rows = json["hidden_size_per_layer_input"], json["vocab_size_per_layer_input"]
    if size < 0:
        raise CheckpointError(
            f"config.json: hidden_size_per_layer_input is {size}, expected 0 (no per-layer embeddings) or "
            "more."
        )
    return PerLayer(rows, size) if size else None


def _experts(json: Json) -> Experts | None:
    count, per_token, width = (json[name] for name in _EXPERTS)
    if not json["enable_moe_block"]:
        return None
    if None in (count, per_token, width) or not 1 <= per_token <= count:
        raise CheckpointError(
            f"config.json: enable_moe_block is true with num_experts {count}, top_k_experts {per_token} and "
            f"moe_intermediate_size {width}; expected positive numbers, and at most all experts for a token."
        )
    return Experts(count, per_token, width, beside=True, router_norm=True, gains=True)


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf
