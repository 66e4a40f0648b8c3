"""The record of RoBERTa."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models.bert import config as bert
from jaxft.models.bert.names import entries
from jaxft.models.encoder import Encoder, EncoderConfig
from jaxft.models.family import Family, Json, Score
from jaxft.models.hf_encoders import encoder_codec


def _read(json: Json, tensors: Collection[str], family: str) -> EncoderConfig:
    offset = json["pad_token_id"] + 1
    return dataclasses.replace(bert.read(json, tensors), position_offset=offset, family=family)


def _write(config: EncoderConfig) -> dict[str, Any]:
    return bert.write(config) | {"pad_token_id": config.position_offset - 1}


def roberta_family(name: str, architecture: str, vocab_size: int) -> Family:
    """The record of a family of RoBERTa's architecture; `vocab_size`: the default of its configuration."""
    return Family(
        name=name,
        module=Encoder,
        huggingface=encoder_codec(
            architecture=architecture,
            read=functools.partial(_read, family=name),
            write=_write,
            reads=bert.READS | {"pad_token_id"},
            keys=bert.keys(vocab_size=vocab_size, pad_token_id=1),
            entries=entries,
            rename=lambda name: name.removeprefix("roberta."),
            score=Score(
                "classifier.out_proj.weight",
                "classifier.out_proj.bias",
                prefix="roberta.",
                renamed={"pooler.dense.": "classifier.dense."},
            ),
        ),
    )


ROBERTA = roberta_family("roberta", "RobertaModel", 50265)
