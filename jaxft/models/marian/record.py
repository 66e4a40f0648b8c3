"""The record of Marian."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models import hf_encoder_decoders as shared
from jaxft.models.encoder_decoder_config import EncoderDecoderConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.special_ids import SpecialIds

FORM = shared.Form(embedding_norm=False, sinusoidal=True)


def _read(json: Json, tensors: Collection[str]) -> EncoderDecoderConfig:
    rows = json["decoder_vocab_size"]
    if rows not in (None, 0, json["vocab_size"]):
        raise CheckpointError(
            f"config.json: decoder_vocab_size is {rows} and vocab_size {json['vocab_size']}; jaxft's marian "
            "has one vocabulary for both sides. Use transformers for this model."
        )
    return shared.read(json, tensors, "marian", FORM)


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    return shared.write(config) | {"decoder_vocab_size": config.vocab_size}


MARIAN = shared.encoder_decoder_family(
    "marian",
    "MarianMTModel",
    FORM,
    shared.keys(
        vocab_size=58101,
        decoder_start_token_id=58100,
        forced_eos_token_id=0,
        decoder_vocab_size=None,
        share_encoder_decoder_embeddings=True,
    ),
    SpecialIds(eos=(0,), pad=58100),
    read=_read,
    write=_write,
    reads=shared.READS | {"decoder_vocab_size"},
)
