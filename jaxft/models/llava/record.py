"""The record of LLaVA 1.5 (Liu et al., 2023, arxiv.org/abs/2310.03744)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_keys import COMMON, Keys
from jaxft.models.hf_parts import check_token, renamed, text_entries
from jaxft.models.hf_vision import (
    VISION_TARGETS,
    clip_keys,
    read_clip,
    siglip_entries,
    write_siglip,
)
from jaxft.models.llama import LLAMA
from jaxft.models.llama.record import write as write_llama
from jaxft.models.names import Entry
from jaxft.models.vision import VisionTower

_READS = frozenset(
    "text_config vision_config image_token_index projector_hidden_act vision_feature_select_strategy "
    "vision_feature_layer multimodal_projector_bias tie_word_embeddings".split()
)
_KEYS = Keys(
    COMMON
    | {
        "text_config": None,
        "vision_config": None,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
    },
    unchecked=frozenset({"text_config", "vision_config", "vision_feature_layer"}),
    no_effect=frozenset({"image_seq_length", "vocab_size"}),
    aliases={"image_token_id": "image_token_index"},
)
_VISION_KEYS = clip_keys()
# Beginnings of names in older files.
_RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "language_model.",
    "vision_tower.vision_model.": "vision_tower.",
}
_CLASS_TOKEN = {"default": False, "full": True}  # whether it is selected too


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json: Llama's, with a tower for images.

    Raises:
        CheckpointError: for a text part other than Llama's, a part for images other than CLIP's, or sizes
            that do not fit together.
    """
    text, vision = json["text_config"], json["vision_config"]
    for part, name, kind in (
        (text, "text_config", "llama"),
        (vision, "vision_config", "clip_vision_model"),
    ):
        found = part.get("model_type", kind) if isinstance(part, dict) else part
        if found != kind:
            raise CheckpointError(
                f"config.json: {name} is {found!r:.40}; jaxft's llava has a {kind} there."
            )
    # transformers ties them if either says so.
    tied = json["tie_word_embeddings"] or text.get("tie_word_embeddings", False)
    own = {"model_type": "llama", "tie_word_embeddings": tied}
    config = LLAMA.huggingface.config({**text, **own}, tensors)
    strategy = json["vision_feature_select_strategy"]
    if strategy not in _CLASS_TOKEN:
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy is {strategy!r}, expected "
            f"{' or '.join(_CLASS_TOKEN)}."
        )
    tower = VisionTower(
        encoder=read_clip(vision, _VISION_KEYS),
        token=json["image_token_index"],
        width=config.hidden_size,
        bias=json["multimodal_projector_bias"],
        states=_states(json["vision_feature_layer"]),
        class_token=_CLASS_TOKEN[strategy],
        projector=read_activation(json["projector_hidden_act"]),
    )
    check_token("image_token_index", tower.token, config.vocab_size)
    return dataclasses.replace(config, towers=(tower,), family="llava", source="")


def _states(layers):
    found = layers if isinstance(layers, (list, tuple)) else [layers]
    if not found or not all(type(i) is int for i in found):
        raise CheckpointError(
            f"config.json: vision_feature_layer is {layers!r}, expected a layer or a list of layers."
        )
    return tuple(found)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with a tower."""
    (tower,) = config.towers
    states, kinds = tower.states, {kept: name for name, kept in _CLASS_TOKEN.items()}
    return {
        "text_config": {"model_type": "llama"} | write_llama(config),
        "vision_config": {"model_type": "clip_vision_model"} | write_siglip(tower.encoder),
        "image_token_index": tower.token,
        "image_seq_length": tower.tokens,
        "projector_hidden_act": ACTIVATIONS[tower.projector],
        "vision_feature_select_strategy": kinds[tower.class_token],
        "vision_feature_layer": states[0] if len(states) == 1 else list(states),
        "multimodal_projector_bias": tower.bias,
        "tie_word_embeddings": config.tie_embeddings,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a LlavaForConditionalGeneration."""
    (tower,) = config.towers
    found = siglip_entries(tower.encoder, "model.vision_tower.", "vision/encoder/")
    for name, path in (("linear_1", "up"), ("linear_2", "projection")):
        theirs = f"model.multi_modal_projector.{name}"
        found.append(Entry(f"{theirs}.weight", (f"vision/{path}/kernel",), True))
        if tower.bias:
            found.append(Entry(f"{theirs}.bias", (f"vision/{path}/bias",)))
    return found + text_entries(names.decoder_entries(config))


def _ignores(name: str, config: DecoderConfig) -> bool:
    """Returns whether the tensor is a buffer or a copy of the embeddings."""
    return name.endswith(".embeddings.position_ids") or names.decoder_ignores(name, config)


LLAVA = Family(
    name="llava",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="LlavaForConditionalGeneration",
        read=read,
        write=write,
        reads=_READS,
        keys=_KEYS,
        entries=entries,
        rename=renamed(_RENAMED),
        ignores=_ignores,
        special=LLAMA.huggingface.special,
    ),
    targets=VISION_TARGETS,
)
