"""The text parts of models that read images or sounds too: their files, loaded as the decoder inside."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from jaxft.models.config import DecoderConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.gemma3 import GEMMA3
from jaxft.models.gemma4 import GEMMA4
from jaxft.models.hf_keys import Keys
from jaxft.models.mistral import MISTRAL
from jaxft.models.qwen3 import QWEN3
from jaxft.models.qwen3_5 import QWEN3_5
from jaxft.models.qwen3_5_moe import QWEN3_5_MOE

# Beginnings of names in files of transformers 4 and 5, and in those of the text model.
_RENAMED = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_OTHERS = ("vision_tower.", "multi_modal_projector.", "visual.")
_OTHERS += ("embed_vision.", "audio_tower.", "embed_audio.")
_POSITIONS = ("mrope_section", "mrope_interleaved")


def text_part(name: str, decoder: Family) -> Family:
    """The record of the model_type `name`, whose text part is a `decoder`.

    A config is that of the decoder, and so are the files that are written: without the parts for images and
    sounds.
    """
    codec = decoder.huggingface
    text = dataclasses.replace(
        codec,
        read=functools.partial(_read, name=name, decoder=decoder),
        reads=frozenset({"text_config", "tie_word_embeddings"}),
        keys=Keys(
            {"text_config": None, "tie_word_embeddings": None},
            unchecked=frozenset({"text_config", "tie_word_embeddings"}),
        ),
        rename=lambda tensor: codec.rename(_renamed(tensor)),
        ignores=lambda tensor, config: (
            tensor.removeprefix("model.").startswith(_OTHERS) or codec.ignores(tensor, config)
        ),
    )
    return dataclasses.replace(decoder, name=name, huggingface=text, gguf=None)


def _renamed(tensor: str) -> str:
    for theirs, ours in _RENAMED.items():
        if tensor.startswith(theirs):
            return ours + tensor.removeprefix(theirs)
    return tensor


def _read(json: Json, tensors: Collection[str], name: str, decoder: Family) -> DecoderConfig:
    text = json["text_config"]
    if text is None:  # Early files have the keys of the text part beside vision_config.
        text = {key: json[key] for key in json if key not in ("text_config", "vision_config")}
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config is {text!r:.40}, expected an object.")
    tied = json["tie_word_embeddings"]
    text = text | ({} if tied is None else {"tie_word_embeddings": tied})
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict):
            text[key] = one_position(text[key])
    warnings.warn(
        f"{name}: only the text part is loaded, a {decoder.name}; images and sounds are not read, and "
        "saved models lack the parts for them.",
        stacklevel=2,
    )
    config = decoder.huggingface.config(text | {"model_type": decoder.name}, tensors)
    return dataclasses.replace(config, source="")


def one_position(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters for texts, whose positions in time, height and width are equal."""
    kept = {key: value for key, value in parameters.items() if key not in _POSITIONS}
    return {
        key: "default" if key in ("type", "rope_type") and value == "mrope" else value
        for key, value in kept.items()
    }


TEXT_PARTS: tuple[Family, ...] = (
    text_part("gemma3", GEMMA3),
    text_part("gemma4", GEMMA4),
    text_part("qwen3_vl", QWEN3),
    text_part("qwen3_5", QWEN3_5),
    text_part("qwen3_5_moe", QWEN3_5_MOE),
    text_part("mistral3", MISTRAL),
)
