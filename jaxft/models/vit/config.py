"""config.json of ViT."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models.encoder import EncoderConfig
from jaxft.models.family import Json
from jaxft.models.hf_encoders import READS as COMMON
from jaxft.models.hf_encoders import read_common, write_common

READS = COMMON | {"image_size", "patch_size", "num_channels", "qkv_bias"}


def read(json: Json, tensors: Collection[str]) -> EncoderConfig:
    """The EncoderConfig of a config.json."""
    size, patch = json.get("image_size", 224), json.get("patch_size", 16)
    return EncoderConfig(
        **read_common(json, tensors),
        num_positions=(size // patch) ** 2 + 1,
        pre_norm=True,
        attention_bias=json.get("qkv_bias", True),
        image_size=size,
        patch_size=patch,
        channels=json.get("num_channels", 3),
        family="vit",
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of an EncoderConfig."""
    return write_common(config) | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": config.attention_bias,
    }
