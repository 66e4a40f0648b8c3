"""The record of Llama: the parts that decoders share, plus optional biases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf, GgufHeader, Json
from jaxft.models.special_ids import SpecialIds


def read(json: Json, tensors: Collection[str], family: str = "llama") -> DecoderConfig:
    """The DecoderConfig of a config.json with Llama's keys."""
    return dataclasses.replace(
        hf_config.read_decoder(json, family, json["hidden_act"]),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        mlp_bias=json["mlp_bias"],
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with Llama's keys."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return hf_config.write_decoder(config) | biases


def _read_gguf(header: GgufHeader) -> DecoderConfig:
    return dataclasses.replace(
        gguf.read_gguf_decoder(header, "llama"),
        attention_bias=header.has("blk.0.attn_q.bias"),
        output_bias=header.has("blk.0.attn_output.bias"),
        mlp_bias=header.has("blk.0.ffn_up.bias"),
    )


# Also used by Mistral: llama.cpp has one architecture for both.
LLAMA_GGUF = Gguf(
    architecture="llama",
    read=_read_gguf,
    write=gguf.write_gguf_decoder,
    reads=gguf.READS,
    # llama.cpp's converter permutes the rows of queries and keys for its rotary order.
    entries=functools.partial(gguf.gguf_decoder_entries, permuted=True),
    beside=gguf.rope_factors,
    ignores=frozenset({gguf.ROPE_FACTORS}),
)


LLAMA = Family(
    name="llama",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="LlamaForCausalLM",
        read=read,
        write=write,
        reads=hf_config.READS | {"hidden_act", "attention_bias", "mlp_bias"},
        special=SpecialIds(bos=1, eos=(2,)),
        keys=hf_config.decoder_keys(
            **hf_config.sizes(4096, 11008, 32, 32, 2048),
            num_key_value_heads=None,
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
        ),
    ),
    gguf=LLAMA_GGUF,
)
