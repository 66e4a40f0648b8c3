"""The record of Mistral."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json
from jaxft.models.llama.record import LLAMA_GGUF
from jaxft.models.special_ids import SpecialIds


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    window = json["sliding_window"]
    windows = hf_config.read_windows(json, window, lambda layer: window is not None)
    return dataclasses.replace(
        hf_config.read_decoder(json, "mistral", json["hidden_act"]), windows=windows
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    windows = hf_config.write_windows(config)
    if len(set(config.windows)) < 2:
        # transformers reads a Mistral with layer_types as a Ministral, which must have a window.
        del windows["layer_types"]
    return hf_config.write_decoder(config) | windows


MISTRAL = Family(
    name="mistral",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="MistralForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_config.WINDOW_READS | {"hidden_act"},
        special=SpecialIds(bos=1, eos=(2,)),
        keys=hf_config.decoder_keys(
            "sliding_window",
            **hf_config.sizes(4096, 14336, 32, 32, 131072),
            num_key_value_heads=8,
            hidden_act="silu",
            sliding_window=4096,
            layer_types=None,
        ),
    ),
    gguf=LLAMA_GGUF,
)
