"""The record of Mistral."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, HuggingFace, Json


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    config = hf_config.read_decoder(json, "mistral")
    return dataclasses.replace(config, windows=hf_config.read_windows(json, lambda layer: True))


def _write(config: DecoderConfig) -> dict[str, Any]:
    return hf_config.write_decoder(config) | hf_config.write_windows(config)


MISTRAL = Family(
    name="mistral",
    module=Decoder,
    huggingface=HuggingFace(
        architecture="MistralForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_config.WINDOW_READS,
        entries=names.decoder_entries,
        rename=names.with_prefix("model."),
        ignores=names.decoder_ignores,
    ),
)
