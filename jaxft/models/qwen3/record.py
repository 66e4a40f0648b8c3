"""The record of Qwen 3: norms on queries and keys, Qwen 2's windows, heads of 128 by default."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf, GgufHeader, Json
from jaxft.models.qwen2 import config as qwen2


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    return dataclasses.replace(
        hf_config.read_decoder(json, "qwen3", json["hidden_act"]),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        qk_norm=True,
        windows=qwen2.read_qwen_windows(json),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return qwen2.write(config) | {"attention_bias": config.attention_bias}


def _read_gguf(header: GgufHeader) -> DecoderConfig:
    return dataclasses.replace(gguf.read_gguf_decoder(header, "qwen3"), qk_norm=True)


QWEN3 = Family(
    name="qwen3",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen3ForCausalLM",
        read=_read,
        write=_write,
        reads=qwen2.READS | {"attention_bias"},
        keys=qwen2.keys(head_dim=128, attention_bias=False),
        entries=functools.partial(names.decoder_entries, norms=names.NORMS | names.QK_NORMS),
    ),
    gguf=Gguf(
        architecture="qwen3",
        read=_read_gguf,
        write=gguf.write_gguf_decoder,
        reads=gguf.READS,
        entries=functools.partial(gguf.gguf_decoder_entries, norms=gguf.NORMS | gguf.QK_NORMS),
    ),
)
