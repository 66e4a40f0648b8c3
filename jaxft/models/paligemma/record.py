"""The record of PaliGemma (Gemma) and PaliGemma 2 (Gemma 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.gemma import GEMMA
from jaxft.models.gemma2 import GEMMA2
from jaxft.models.hf_keys import COMMON, Keys
from jaxft.models.hf_parts import check_token, renamed, text_entries
from jaxft.models.hf_vision import (
    VISION_TARGETS,
    read_siglip,
    siglip_entries,
    siglip_keys,
    write_siglip,
)
from jaxft.models.names import Entry
from jaxft.models.special_ids import SpecialIds
from jaxft.models.vision import VisionTower

_TEXTS = {"gemma": GEMMA, "gemma2": GEMMA2}
_READS = frozenset(
    "text_config vision_config image_token_index projection_dim tie_word_embeddings".split()
)
_KEYS = Keys(
    COMMON
    | {
        "text_config": None,
        "vision_config": None,
        "image_token_index": 256000,
        "projection_dim": 2048,
        "tie_word_embeddings": True,
    },
    unchecked=frozenset({"text_config", "vision_config"}),
    no_effect=frozenset({"vocab_size", "hidden_size"}),
    aliases={"image_token_id": "image_token_index"},
)
_VISION_KEYS = siglip_keys(hidden_size=768, num_attention_heads=12, patch_size=16)
# Beginnings of names in older files.
_RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "language_model.",
    "vision_tower.vision_model.": "vision_tower.",
}


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json: Gemma's, with a tower for images.

    Raises:
        CheckpointError: for a text part other than Gemma's, or sizes that do not fit together.
    """
    text = json["text_config"]
    kind = text.get("model_type", "gemma") if isinstance(text, dict) else text
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise CheckpointError(
            f"config.json: text_config is {kind!r:.40}; jaxft's paligemma has a gemma or gemma2 as its text."
        )
    # Only PaliGemma's own mask counts, not this key.
    text = {name: text[name] for name in text if name != "use_bidirectional_attention"}
    tied = {"tie_word_embeddings": json["tie_word_embeddings"]}
    config = _TEXTS[kind].huggingface.config({**text, "model_type": kind, **tied}, tensors)
    if json["projection_dim"] != config.hidden_size:
        raise CheckpointError(
            f"config.json: projection_dim is {json['projection_dim']}, expected the text part's hidden_size "
            f"{config.hidden_size}."
        )
    tower = VisionTower(
        encoder=read_siglip(json["vision_config"], _VISION_KEYS, ragged=False),
        token=json["image_token_index"],
        width=config.hidden_size,
        bias=True,
        scale=1 / config.embedding_scale,  # Images are not scaled as Gemma scales the embeddings.
    )
    check_token("image_token_index", tower.token, config.vocab_size)
    return dataclasses.replace(
        config, towers=(tower,), prefix_attention=True, family="paligemma", source=""
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with a tower."""
    (tower,), kind = config.towers, _kind(config)
    text = _TEXTS[kind].huggingface.write(dataclasses.replace(config, family=kind))
    return {
        "text_config": {"model_type": kind} | text,
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}
        | write_siglip(tower.encoder),
        "image_token_index": tower.token,
        "projection_dim": config.hidden_size,
        "tie_word_embeddings": config.tie_embeddings,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a PaliGemmaForConditionalGeneration."""
    (tower,), codec = config.towers, _TEXTS[_kind(config)].huggingface
    text = text_entries(codec.entries(config))
    found = siglip_entries(tower.encoder, "model.vision_tower.", "vision/encoder/")
    projection = "model.multi_modal_projector.linear"
    return [
        *found,
        Entry(f"{projection}.weight", ("vision/projection/kernel",), True),
        Entry(f"{projection}.bias", ("vision/projection/bias",)),
        *text,
    ]


def _kind(config):
    """Gemma 2 has norms after attention and MLP."""
    return "gemma2" if config.post_norms else "gemma"


def _ignores(name: str, config: DecoderConfig) -> bool:
    """Returns whether the tensor is a buffer, a copy of the embeddings, or SigLIP's pooling."""
    return name.startswith("model.vision_tower.head.") or names.decoder_ignores(name, config)


PALIGEMMA = Family(
    name="paligemma",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="PaliGemmaForConditionalGeneration",
        read=read,
        write=write,
        reads=_READS,
        keys=_KEYS,
        entries=entries,
        rename=renamed(_RENAMED),
        ignores=_ignores,
        special=SpecialIds(bos=2, eos=(1,), pad=0),
    ),
    targets=VISION_TARGETS,
)
