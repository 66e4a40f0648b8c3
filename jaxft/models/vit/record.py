"""The record of ViT."""

from __future__ import annotations

from jaxft.models.encoder import Encoder
from jaxft.models.family import Family
from jaxft.models.hf_encoders import encoder_codec
from jaxft.models.vit import config, names

VIT = Family(
    name="vit",
    module=Encoder,
    huggingface=encoder_codec(
        architecture="ViTModel",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.KEYS,
        entries=names.entries,
        rename=lambda name: name.removeprefix("vit."),
    ),
)
