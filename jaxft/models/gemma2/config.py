"""config.json and GGUF metadata of Gemma 2, and the parts that Gemma 3 shares."""

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
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
}


def keys(**defaults: Any) -> Keys:
    """The keys of the classes of Gemma 2 and 3; `defaults` are specific to one of them."""
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
    """The DecoderConfig of a config.json that has Gemma 2's keys.

    Args:
        json: the file.
        family: the config's.
        local: layer -> whether it has a window: see jaxft.models.hf_config.read_windows.
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
    """The DecoderConfig of a GGUF file; absent keys mean the window and caps of all Gemma 2s."""
    window = header.get("attention.sliding_window", 4096)
    config = read_later_gguf(header, "gemma2", window, period=2, largest=46)
    local = Rope(**vars(config.rope) | {"theta": local_theta(header, config.rope.theta)})
    return dataclasses.replace(
        config,
        local_rope=None if local == config.rope else local,
        tie_embeddings=True,  # llama.cpp reads no output projection, as for the first Gemma.
        attention_softcap=_cap(header, "attn_logit_softcapping", 50.0),
        final_softcap=_cap(header, "final_logit_softcapping", 30.0),
    )


def read_later_gguf(
    header: GgufHeader, family: str, window: int, period: int, largest: int
) -> DecoderConfig:
    """The DecoderConfig of a GGUF file that has Gemma 2's keys, without soft caps.

    Args:
        header: of the file.
        family: the config's.
        window: of the local layers, in tokens; 0: no layer has a window.
        period: if the file has no pattern, the last of every `period` layers has no window.
        largest: layers of the 27B model, which scales attention differently; its file has no key for it.
    """
    config = gemma.as_gemma(gguf.read_gguf_decoder(header, family))
    pattern, scale = header.get("attention.sliding_window_pattern", period), None
    if isinstance(pattern, list):
        local = [bool(has) for has in pattern]
    else:
        local = [pattern == 0 or i % pattern < pattern - 1 for i in range(config.num_layers)]
    if config.num_layers == largest:
        scale = (config.hidden_size // config.num_heads) ** -0.5
    windows = tuple(window if has else None for has in local)
    return dataclasses.replace(
        config,
        post_norms=True,
        windows=windows if window and any(local) else (),
        attention_scale=scale,
    )


def local_theta(header: GgufHeader, default: float) -> float:
    """The base of the rotary frequencies under windows."""
    return gguf.decimal(header.get("rope.freq_base_swa", default))


def write_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a DecoderConfig."""
    caps = {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
    return write_later_gguf(config) | {key: float(cap) for key, cap in caps.items() if cap}


def write_later_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The keys of `read_later_gguf`."""
    keys = gguf.write_gguf_decoder(config)
    local = [config.window(i) is not None for i in range(config.num_layers)]
    keys["attention.sliding_window"] = next((w for w in config.windows if w is not None), 0)
    if any(local):
        # The number of the first layer without a window, from 1; more than the layers if all have one.
        keys["attention.sliding_window_pattern"] = [*local, False].index(False) + 1
    if config.local_rope is not None:
        keys["rope.freq_base_swa"] = float(config.local_rope.theta)
    return keys


def _cap(header, key, default):
    cap = gguf.decimal(header.get(key, default))
    if cap <= 0:
        raise CheckpointError(f"{header.file}: {key} is {cap}; expected a positive cap.")
    return cap


def _local(layer: int) -> bool:
    return layer % 2 == 0


def _positive(json: Json, name: str) -> float | None:
    """The value of a key, which must be positive or null."""
    if json[name] is not None and json[name] <= 0:
        raise CheckpointError(f"config.json: {name} is {json[name]!r}, expected a positive number.")
    return json[name]
