"""The record of Mistral."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json
from jaxft.models.llama.record import LLAMA_GGUF
from jaxft.models.special_ids import SpecialIds


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    config = hf_config.read_decoder(json, "mistral")
    return dataclasses.replace(config, windows=hf_config.read_windows(json, lambda layer: True))


MISTRAL = Family(
    name="mistral",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="MistralForCausalLM",
        read=_read,
        write=hf_config.write_windowed_decoder,
        reads=hf_config.READS | hf_config.WINDOW_READS,
        special=SpecialIds(bos=1, eos=(2,)),
    ),
    gguf=LLAMA_GGUF,
)
