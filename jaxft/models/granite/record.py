"""The record of Granite 3: Llama with scales of the embeddings, residuals, attention and logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.llama.record import read as read_llama
from jaxft.models.llama.record import write as write_llama
from jaxft.models.special_ids import SpecialIds

SCALES = {
    name: 1.0
    for name in (
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    )
}


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    if json["logits_scaling"] == 0:
        raise CheckpointError("config.json: logits_scaling is 0, expected another number.")
    return dataclasses.replace(
        read_llama(json, tensors, "granite"),
        embedding_scale=float(json["embedding_multiplier"]),
        residual_scale=float(json["residual_multiplier"]),
        attention_scale=float(json["attention_multiplier"]),
        output_scale=1 / json["logits_scaling"],
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_llama(config) | {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.scale,
        "logits_scaling": 1 / config.output_scale,
    }


GRANITE = Family(
    name="granite",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="GraniteForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | {"hidden_act", "attention_bias", "mlp_bias", *SCALES},
        special=SpecialIds(bos=1, eos=(2,)),
        keys=hf_config.decoder_keys(
            **hf_config.sizes(4096, 11008, 32, 32, 2048),
            num_key_value_heads=None,
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            **SCALES,
        ),
    ),
)
