"""The record of RoBERTa."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models.bert import config as bert
from jaxft.models.bert.names import entries
from jaxft.models.encoder import Encoder, EncoderConfig
from jaxft.models.family import Family, Json
from jaxft.models.hf_encoders import encoder_codec


def _read(json: Json, tensors: Collection[str]) -> EncoderConfig:
    offset = json["pad_token_id"] + 1
    return dataclasses.replace(bert.read(json, tensors), position_offset=offset, family="roberta")


def _write(config: EncoderConfig) -> dict[str, Any]:
    return bert.write(config) | {"pad_token_id": config.position_offset - 1}


ROBERTA = Family(
    name="roberta",
    module=Encoder,
    huggingface=encoder_codec(
        architecture="RobertaModel",
        read=_read,
        write=_write,
        reads=bert.READS | {"pad_token_id"},
        keys=bert.keys(vocab_size=50265, pad_token_id=1),
        entries=entries,
        rename=lambda name: name.removeprefix("roberta."),
    ),
)
