"""The record of OLMo 2: norms after attention and MLP, and over all queries and keys of a token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json
from jaxft.models.special_ids import SpecialIds

NORMS = names.QK_NORMS | {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    return dataclasses.replace(
        hf_config.read_decoder(json, "olmo2", json["hidden_act"]),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        qk_norm=True,
        qk_norm_whole=True,
        pre_norms=False,
        post_norms=True,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return hf_config.write_decoder(config) | {"attention_bias": config.attention_bias}


OLMO2 = Family(
    name="olmo2",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Olmo2ForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | {"hidden_act", "attention_bias"},
        special=SpecialIds(eos=(50279,), pad=1),
        keys=hf_config.decoder_keys(
            **hf_config.sizes(4096, 11008, 32, 32, 2048)
            | {"vocab_size": 50304, "rms_norm_eps": 1e-5},
            num_key_value_heads=None,
            hidden_act="silu",
            attention_bias=False,
        ),
        entries=functools.partial(names.decoder_entries, norms=NORMS),
    ),
)
