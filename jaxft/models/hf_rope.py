"""The rotary positions of Hugging Face's config.json <-> Rope."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.rope import turned

Json = Mapping[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
_ORIGINAL = {"original_max_position_embeddings": "original_max_length"}
_NUMBERS = {  # rope_type -> the numbers that it needs, and the fields of a Rope that hold them
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **_ORIGINAL,
    },
    "yarn": {"factor": "factor", **_ORIGINAL},
    "longrope": {"factor": "factor", **_ORIGINAL},
}
_OPTIONAL = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}


def read_rope(json: Json, parameters: Json | None = None, *, partial: bool = False) -> Rope:
    """The rotary positions of all layers. `rope_scaling` overrides `rope_parameters`, as in transformers.

    Args:
        json: the file, with defaults for absent keys.
        parameters: replace those of the file.
        partial: whether the family may turn only a share of a head's features.

    Raises:
        CheckpointError: for a scaling that jaxft does not support, or positions that differ by layer.
    """
    if parameters is None:
        parameters = json["rope_scaling"] or json["rope_parameters"] or {}
    if not {FULL, SLIDING}.isdisjoint(parameters):
        raise CheckpointError(
            "rope_parameters that differ by layer are supported for Gemma 3 and 4 only."
        )
    original = json["original_max_position_embeddings"]
    if original is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    length, theta = json["max_position_embeddings"], json["rope_theta"]
    rope = read_rope_parameters(parameters, length, theta, partial=partial)
    if not partial:
        return rope
    share = parameters.get("partial_rotary_factor", json["partial_rotary_factor"])
    if not _positive(share) or share > 1:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {share!r}, expected a number above 0, at most 1."
        )
    return dataclasses.replace(rope, share=float(share))


def read_rope_parameters(
    parameters: Json, length: int, theta: float | None, *, partial: bool = False
) -> Rope:
    """The Rope of one set of parameters, in the form of transformers 4 or 5.

    Args:
        parameters: of `rope_scaling` or `rope_parameters`.
        length: max_position_embeddings.
        theta: for parameters without it.
        partial: whether a partial_rotary_factor is read elsewhere, and not an error.

    Raises:
        CheckpointError: for a scaling that jaxft does not support, or missing numbers.
    """
    get = parameters.get
    kind = get("rope_type", get("type", "default"))
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise CheckpointError(
            f"config.json: unsupported rope scaling {kind!r} (rope_type of rope_scaling or rope_parameters); "
            f"known: {', '.join(_NUMBERS)}."
        )
    if not partial and get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {get('partial_rotary_factor')!r}; jaxft rotates whole "
            "heads (1.0) in this family."
        )
    numbers = {"rope_theta": theta, "original_max_position_embeddings": length, **parameters}
    grown = (
        kind == "longrope" or "factor" in numbers
    )  # transformers fills in an absent one for longrope only
    if kind in ("yarn", "longrope") and grown and numbers.get("factor") is None:
        numbers["factor"] = length / (numbers["original_max_position_embeddings"] or length)
    optional = [name for name in _OPTIONAL.get(kind, ()) if parameters.get(name)]
    for name in ("rope_theta", *_NUMBERS[kind], *optional):
        if not _positive(numbers.get(name)):
            raise CheckpointError(
                f"config.json: rope scaling {kind!r} has {name}: {numbers.get(name)!r}, expected a positive "
                "number."
            )
    found = {ours: numbers[name] for name, ours in _NUMBERS[kind].items()}
    if kind == "yarn":
        found |= _read_yarn(parameters, numbers["factor"])
    if kind == "longrope":
        found |= _read_longrope(parameters)
    if kind == "dynamic":
        if found["factor"] < 1:
            raise CheckpointError(
                f"config.json: rope scaling 'dynamic' has factor: {found['factor']}, expected 1 or more."
            )
        found["original_max_length"] = length
    return Rope(theta=float(numbers["rope_theta"]), scaling=kind, **found)


def check_factors(rope: Rope, head_dim: int) -> None:
    """Raises CheckpointError if a share of a head, or the factors of LongRoPE, are not of whole pairs."""
    size = turned(rope, head_dim)
    if size < 2 or size % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {rope.share} leaves {size} of a head's {head_dim} features, "
            "expected an even number, since rotary positions turn pairs of features."
        )
    for name, factors in (("short_factor", rope.factors), ("long_factor", rope.long_factors)):
        if factors and len(factors) != size // 2:
            raise CheckpointError(
                f"config.json: {name} has {len(factors)} numbers, expected {size // 2}: one for each pair of "
                "rotated features of a head."
            )


def write_rope_parameters(rope: Rope) -> dict[str, Any]:
    """The parameters of one Rope, in transformers 5's form."""
    json: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    json |= {name: getattr(rope, ours) for name, ours in _NUMBERS[rope.scaling].items()}
    if rope.share != 1:
        json["partial_rotary_factor"] = rope.share
    if rope.scaling == "yarn":
        json |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        json |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
    if rope.scaling == "longrope":
        json |= {"short_factor": list(rope.factors), "long_factor": list(rope.long_factors)}
        json |= {"attention_factor": rope.attention_factor}
    return json


def write_rope(rope: Rope) -> dict[str, Any]:
    """Both forms: transformers 5 reads `rope_parameters`, earlier versions `rope_theta` and scaling.

    Raises:
        CheckpointError: for factors of a GGUF file, which config.json cannot hold.
    """
    if rope.factors and rope.scaling != "longrope":
        raise CheckpointError(
            "this model's rotary factors came from a GGUF file and config.json cannot hold them; "
            "load the Hugging Face checkpoint instead."
        )
    main = write_rope_parameters(rope)
    scaling = {k: v for k, v in main.items() if k != "rope_theta"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else scaling,
        "rope_parameters": main,
    }


def usable_length(length: int, rope: Rope) -> int:
    """The number of positions: max_position_embeddings, which YaRN's files may leave unscaled."""
    if rope.scaling not in ("yarn", "dynamic"):
        return length
    return max(length, math.floor(rope.factor * rope.original_max_length))


def written_length(length: int, rope: Rope) -> int:
    """The inverse of `usable_length`; under "dynamic" max_position_embeddings is the original length."""
    return rope.original_max_length if rope.scaling == "dynamic" else length


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


def _read_longrope(parameters: Json) -> dict[str, Any]:
    found: dict[str, Any] = {"attention_factor": parameters.get("attention_factor")}
    for name, ours in (("short_factor", "factors"), ("long_factor", "long_factors")):
        factors = parameters.get(name)
        if not isinstance(factors, list) or not factors or not all(map(_positive, factors)):
            raise CheckpointError(
                f"config.json: rope scaling 'longrope' has {name}: {factors!r}, expected a list of positive "
                "numbers."
            )
        found[ours] = tuple(map(float, factors))
    return found


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf
