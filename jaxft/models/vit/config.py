"""config.json of ViT."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models import hf_encoders
from jaxft.models.encoder import EncoderConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_encoders import READS as COMMON
from jaxft.models.hf_encoders import read_common, write_common
from jaxft.models.hf_keys import Keys
from jaxft.models.hf_vision import square

READS = COMMON | frozenset(
    "image_size patch_size num_channels qkv_bias pooler_output_size head_dim".split()
)
KEYS = Keys(
    hf_encoders.DEFAULTS
    | {
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_output_size": None,  # the hidden size
        "head_dim": None,  # which transformers reads, and its class does not list
        "pooler_act": "tanh",
    },
    unchecked=frozenset({"image_size", "patch_size"}),
    no_effect=hf_encoders.NO_EFFECT,
)


def read(json: Json, tensors: Collection[str]) -> EncoderConfig:
    """The EncoderConfig of a config.json.

    Raises:
        CheckpointError: for images or patches that are not square, or a pooler or heads of another width.
    """
    size, patch = square(json, "image_size"), square(json, "patch_size")
    width = json["hidden_size"]
    expected = {"pooler_output_size": width, "head_dim": width // json["num_attention_heads"]}
    for name in expected:
        if json[name] not in (None, expected[name]):
            raise CheckpointError(
                f"config.json: {name} is {json[name]!r}, which jaxft's vit does not compute; expected "
                f"{expected[name]}, which follows from hidden_size."
            )
    return EncoderConfig(
        **read_common(json, tensors),
        num_positions=(size // patch) ** 2 + 1,
        pre_norm=True,
        attention_bias=json["qkv_bias"],
        image_size=size,
        patch_size=patch,
        channels=json["num_channels"],
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
