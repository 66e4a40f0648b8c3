"""config.json and GGUF metadata of Gemma 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_rope
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader, Json
from jaxft.models.gemma2 import config as gemma2

GGUF_READS = gemma2.GGUF_READS - {"attn_logit_softcapping"}
# transformers' class also has attn_logit_softcapping, but its model ignores it.
READS = gemma2.LATER_READS - {"original_max_position_embeddings"} | {
    "rope_local_base_freq",
    "sliding_window_pattern",
}
THETA, LOCAL_THETA = 1e6, 1e4  # of layers without and with a window, by default


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json."""
    period = json["sliding_window_pattern"]
    main, local = _ropes(json)
    config = gemma2.read_later_gemma(json, "gemma3_text", lambda i: (i + 1) % period != 0, main)
    return dataclasses.replace(config, qk_norm=True, local_rope=local)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig."""
    json = gemma2.write(config)
    both = {
        "full_attention": json["rope_parameters"],
        "sliding_attention": hf_rope.write_rope_parameters(config.local_rope),
    }
    return json | {"rope_local_base_freq": config.local_rope.theta, "rope_parameters": both}


def read_gguf(header: GgufHeader) -> DecoderConfig:
    """The DecoderConfig of a GGUF file; without a window in the file, no layer has one."""
    window = header.get("attention.sliding_window", 0)
    config = gemma2.read_later_gguf(header, "gemma3_text", window, period=6, largest=62)
    return dataclasses.replace(
        config,
        qk_norm=True,
        local_rope=Rope(theta=gemma2.local_theta(header, LOCAL_THETA)),
        final_softcap=gguf.decimal(header.get("final_logit_softcapping", 0.0)) or None,
    )


def write_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a DecoderConfig."""
    keys = gemma2.write_later_gguf(config)
    cap = config.final_softcap
    return keys | ({"final_logit_softcapping": float(cap)} if cap else {})


def _ropes(json: Json) -> tuple[Rope, Rope]:
    """(rotary positions of layers without a window, with a window), in transformers 4's or 5's form.

    Raises:
        CheckpointError: for parameters that transformers would only partly use.
    """
    both, scaling = json["rope_parameters"] or {}, json["rope_scaling"] or {}
    mixed = "full_attention" in scaling or ("type" in scaling and "rope_type" not in scaling)
    mixed |= not all(part is None or isinstance(part, dict) for part in both.values())
    if not both.keys() <= {"full_attention", "sliding_attention"} or mixed:
        raise CheckpointError(
            "config.json: rope_parameters of gemma3_text must hold full_attention and sliding_attention, "
            f"each with its own parameters, and rope_scaling those of full_attention, with a rope_type; got "
            f"{both!r} and {scaling!r}."
        )
    parts = {**(both.get("full_attention") or {}), **scaling}, both.get("sliding_attention") or {}
    if not all(part.get("truncate", True) for part in parts):
        raise CheckpointError(
            "config.json: transformers' gemma3_text ignores a rope scaling's truncate: false; leave it out."
        )
    thetas = json["rope_theta"], json["rope_local_base_freq"]
    read, length = hf_rope.read_rope_parameters, json["max_position_embeddings"]
    main, local = (read(part, length, theta) for part, theta in zip(parts, thetas, strict=True))
    return main, local
