"""config.json of BERT, and what RoBERTa has from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models.encoder import EncoderConfig
from jaxft.models.family import Json
from jaxft.models.hf_encoders import READS as COMMON
from jaxft.models.hf_encoders import read_common, write_common

READS = COMMON | {"vocab_size", "max_position_embeddings", "type_vocab_size"}


def read(json: Json, tensors: Collection[str]) -> EncoderConfig:
    """The EncoderConfig of a config.json."""
    return EncoderConfig(
        **read_common(json, tensors),
        vocab_size=json.get("vocab_size", 30522),
        num_positions=json.get("max_position_embeddings", 512),
        token_types=json.get("type_vocab_size", 2),
        family="bert",
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of an EncoderConfig."""
    return write_common(config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.num_positions,
        "type_vocab_size": config.token_types,
        "pad_token_id": 0,
    }
