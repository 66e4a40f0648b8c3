"""The record of Qwen 2."""

from __future__ import annotations

import dataclasses

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf, GgufHeader
from jaxft.models.qwen2 import config


def _read_gguf(header: GgufHeader) -> DecoderConfig:
    return dataclasses.replace(gguf.read_gguf_decoder(header, "qwen2"), attention_bias=True)


QWEN2 = Family(
    name="qwen2",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen2ForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.READS,
        # transformers also reads head_dim, which its class does not list.
        keys=config.keys(),
    ),
    gguf=Gguf(
        architecture="qwen2",
        read=_read_gguf,
        write=gguf.write_gguf_decoder,
        reads=gguf.READS,
        entries=gguf.gguf_decoder_entries,
    ),
)
