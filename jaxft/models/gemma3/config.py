"""config.json and GGUF metadata of Gemma 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.family import GgufHeader, Json
from jaxft.models.gemma2 import config as gemma2

GGUF_READS = gemma2.GGUF_READS - {"attn_logit_softcapping"}
READS = gemma2.READS | {"rope_local_base_freq", "sliding_window_pattern"}
THETA, LOCAL_THETA = 1e6, 1e4  # of layers without and with a window, by default


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json."""
    period = json.get("sliding_window_pattern", 6)
    main, local = _ropes(json)
    config = gemma2.read_later_gemma(json, "gemma3_text", lambda i: (i + 1) % period != 0, main)
    return dataclasses.replace(config, qk_norm=True, local_rope=local)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig."""
    json = gemma2.write(config)
    both = {
        "full_attention": json["rope_parameters"],
        "sliding_attention": hf_config.write_rope_parameters(config.local_rope),
    }
    return json | {"rope_local_base_freq": config.local_rope.theta, "rope_parameters": both}


def read_gguf(header: GgufHeader) -> DecoderConfig:
    """The DecoderConfig of a GGUF file; without a window in it, all layers see all."""
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
    """(rotary positions of layers without a window, of those with one), as transformers 4 or 5 has them."""
    parameters = json.get("rope_parameters") or {}
    if "full_attention" not in parameters:
        local = Rope(theta=float(json.get("rope_local_base_freq", LOCAL_THETA)))
        return hf_config.read_rope(json, THETA), local
    read = hf_config.read_rope_parameters
    main = read(parameters["full_attention"], json, THETA)
    return main, read(parameters["sliding_attention"], json, LOCAL_THETA)
