"""The record of Idefics3, and of models of its architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.hf_keys import COMMON, Keys
from jaxft.models.hf_parts import check_token, text_entries
from jaxft.models.hf_vision import (
    VISION_TARGETS,
    read_siglip,
    siglip_entries,
    siglip_keys,
    write_siglip,
)
from jaxft.models.llama import LLAMA
from jaxft.models.llama.record import write as write_llama
from jaxft.models.names import Entry
from jaxft.models.special_ids import SpecialIds
from jaxft.models.vision import VisionTower

_READS = frozenset(
    "text_config vision_config image_token_id scale_factor tie_word_embeddings".split()
)
_KEYS = Keys(
    COMMON
    | {
        "text_config": None,
        "vision_config": None,
        "image_token_id": 128257,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    unchecked=frozenset({"text_config", "vision_config"}),
)
_VISION_KEYS = siglip_keys()


def read(json: Json, tensors: Collection[str], family: str = "idefics3") -> DecoderConfig:
    """The DecoderConfig of a config.json: Llama's, with a tower for images.

    Raises:
        CheckpointError: for a text part other than Llama's, or sizes that do not fit together.
    """
    text = json["text_config"]
    if not isinstance(text, dict) or text.get("model_type", "llama") != "llama":
        kind = text.get("model_type") if isinstance(text, dict) else text
        raise CheckpointError(
            f"config.json: text_config is {kind!r:.40}; jaxft's {family} has a llama as its text part."
        )
    tied = {"tie_word_embeddings": json["tie_word_embeddings"]}
    config = LLAMA.huggingface.config({**text, "model_type": "llama", **tied}, tensors)
    if json["scale_factor"] < 1:
        raise CheckpointError(
            f"config.json: scale_factor is {json['scale_factor']}, expected 1 or more."
        )
    tower = VisionTower(
        encoder=read_siglip(json["vision_config"], _VISION_KEYS, ragged=True),
        token=json["image_token_id"],
        width=config.hidden_size,
        shuffle=json["scale_factor"],
    )
    check_token("image_token_id", tower.token, config.vocab_size)
    return dataclasses.replace(config, towers=(tower,), family=family, source="")


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with a tower."""
    (tower,) = config.towers
    return {
        "text_config": {"model_type": "llama"} | write_llama(config),
        "vision_config": {"model_type": f"{config.family}_vision"} | write_siglip(tower.encoder),
        "image_token_id": tower.token,
        "scale_factor": tower.shuffle,
        "tie_word_embeddings": config.tie_embeddings,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of an Idefics3ForConditionalGeneration."""
    (tower,) = config.towers
    text = text_entries(names.decoder_entries(config), "text_model")
    found = siglip_entries(tower.encoder, "model.vision_model.", "vision/encoder/")
    projection = "model.connector.modality_projection.proj.weight"
    return [*found, Entry(projection, ("vision/projection/kernel",), True), *text]


def tiled_family(name: str, architecture: str) -> Family:
    """The record of a model_type with Idefics3's architecture."""
    return Family(
        name=name,
        module=Decoder,
        huggingface=hf_config.decoder_codec(
            architecture=architecture,
            read=functools.partial(read, family=name),
            write=write,
            reads=_READS,
            keys=_KEYS,
            entries=entries,
            special=SpecialIds(pad=128002),
        ),
        targets=VISION_TARGETS,
    )


IDEFICS3 = tiled_family("idefics3", "Idefics3ForConditionalGeneration")
