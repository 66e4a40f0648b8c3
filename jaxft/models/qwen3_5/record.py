"""The record of Qwen3.5's dense text models; jaxft.models.towers reads them from whole Qwen3.5 models."""

from __future__ import annotations

import functools
from collections.abc import Collection

from jaxft.models import hf_config, hf_delta, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    return hf_delta.read(json, "qwen3_5_text")


QWEN3_5 = Family(
    name="qwen3_5_text",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen3_5ForCausalLM",
        read=_read,
        write=hf_delta.write,
        reads=hf_delta.READS,
        ignores=hf_delta.ignores,
        rename=hf_delta.rename,
        keys=hf_delta.keys(
            **hf_config.sizes(4096, 12288, 32, 16, 32768),
            vocab_size=248320,
            num_key_value_heads=4,
        ),
        entries=functools.partial(names.decoder_entries, norms=names.NORMS | names.QK_NORMS),
    ),
)
