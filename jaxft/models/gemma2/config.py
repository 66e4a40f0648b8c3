"""config.json and GGUF metadata of Gemma 2, and what Gemma 3 has from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader, Json
from jaxft.models.gemma import config as gemma
from jaxft.models.hf_keys import Keys

LATER_READS = (
    gemma.READS
    | hf_config.WINDOW_READS
    | {"hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping"}
)
READS = LATER_READS | {"attn_logit_softcapping"}
GGUF_READS = gguf.READS | {
    "attention.sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}


def keys(**defaults: Any) -> Keys:
    """The keys of the classes of Gemma 2 and 3, of which `defaults` are one's own."""
    return gemma.keys(
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        num_key_value_heads=4,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window=4096,
        layer_types=None,
        **defaults,
    )


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json."""
    config = read_later_gemma(json, "gemma2", _local)
    return dataclasses.replace(config, attention_softcap=_positive(json, "attn_logit_softcapping"))


def read_later_gemma(
    json: Json, family: str, local: Callable[[int], bool], rope: Rope | None = None
) -> DecoderConfig:
    """The DecoderConfig of a config.json that has what Gemma 2's has.

    Args:
        json: the file.
        family: the config's.
        local: which layers have a window: see jaxft.models.hf_config.read_windows.
        rope: see jaxft.models.hf_config.read_decoder.
    """
    return dataclasses.replace(
        gemma.read_gemma(json, family, json["hidden_activation"], rope),
        post_norms=True,
        attention_scale=_positive(json, "query_pre_attn_scalar") ** -0.5,
        final_softcap=_positive(json, "final_logit_softcapping"),
        windows=hf_config.read_windows(json, json["sliding_window"], local),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig."""
    return (
        gemma.write(config)
        | hf_config.write_windows(config)
        | {
            "query_pre_attn_scalar": round(config.scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    )


def read_gguf(header: GgufHeader) -> DecoderConfig:
    """The DecoderConfig of a GGUF file."""
    return read_later_gguf(header, "gemma2", _local, largest=46)


def read_later_gguf(
    header: GgufHeader, family: str, local: Callable[[int], bool], largest: int
) -> DecoderConfig:
    """The DecoderConfig of a GGUF file that has what Gemma 2's has.

    Args:
        header: of the file.
        family: the config's.
        local: whether a layer has a window.
        largest: layers of the 27B model, which scales attention otherwise; its file doesn't say so.
    """
    config = gemma.as_gemma(gguf.read_gguf_decoder(header, family))
    window, scale = header.get("attention.sliding_window"), None
    windows = tuple(window if local(i) else None for i in range(config.num_layers))
    if config.num_layers == largest:
        scale = (config.hidden_size // config.num_heads) ** -0.5
    return dataclasses.replace(
        config,
        post_norms=True,
        windows=windows if window else (),
        attention_scale=scale,
        attention_softcap=header.get("attn_logit_softcapping"),
        final_softcap=header.get("final_logit_softcapping"),
    )


def _local(layer: int) -> bool:
    return layer % 2 == 0


def _positive(json: Json, name: str) -> float | None:
    """The value of a key, which must be positive or null."""
    if json[name] is not None and json[name] <= 0:
        raise CheckpointError(f"config.json: {name} is {json[name]!r}, expected a positive number.")
    return json[name]
