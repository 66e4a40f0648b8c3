"""The record of Llama: what decoders share is Llama's, but for its optional biases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf, Json


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    return dataclasses.replace(
        hf_config.read_decoder(json, "llama", json["hidden_act"]),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        mlp_bias=json["mlp_bias"],
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return hf_config.write_decoder(config) | biases


LLAMA = Family(
    name="llama",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="LlamaForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | {"hidden_act", "attention_bias", "mlp_bias"},
        keys=hf_config.decoder_keys(
            **hf_config.sizes(4096, 11008, 32, 32, 2048),
            num_key_value_heads=None,
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
        ),
    ),
    gguf=Gguf(
        architecture="llama",
        read=lambda header: gguf.read_gguf_decoder(header, "llama"),
        reads=gguf.READS,
        # llama.cpp's converter permutes the rows of queries and keys for its rotary order.
        entries=functools.partial(gguf.gguf_decoder_entries, permuted=True),
    ),
)
