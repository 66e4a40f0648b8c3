"""The record of Llama: what decoders share is Llama's."""

from __future__ import annotations

import dataclasses
import functools

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf, GgufHeader
from jaxft.models.special_ids import SpecialIds


def _read_gguf(header: GgufHeader) -> DecoderConfig:
    return dataclasses.replace(
        gguf.read_gguf_decoder(header, "llama"),
        attention_bias=header.has("blk.0.attn_q.bias"),
        output_bias=header.has("blk.0.attn_output.bias"),
        mlp_bias=header.has("blk.0.ffn_up.bias"),
    )


# Mistral's too: llama.cpp has one architecture for both.
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
        read=lambda json, tensors: hf_config.read_decoder(json, "llama"),
        write=hf_config.write_decoder,
        reads=hf_config.READS,
        special=SpecialIds(bos=1, eos=(2,)),
    ),
    gguf=LLAMA_GGUF,
)
