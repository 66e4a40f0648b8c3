"""config.json of BERT, and the parts that RoBERTa shares."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models import hf_encoders
from jaxft.models.encoder import EncoderConfig
from jaxft.models.family import Json
from jaxft.models.hf_encoders import READS as COMMON
from jaxft.models.hf_encoders import read_common, write_common
from jaxft.models.hf_keys import Keys

READS = COMMON | {"vocab_size", "max_position_embeddings", "type_vocab_size"}


def keys(**defaults: Any) -> Keys:
    """The keys of the classes of BERT and RoBERTa; `defaults` are specific to one of them."""
    common = dict(vocab_size=30522, max_position_embeddings=512, type_vocab_size=2)
    # transformers 4 had relative positions, transformers 5 has none.
    switches = dict(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return Keys(
        hf_encoders.DEFAULTS | common | switches | defaults, no_effect=hf_encoders.NO_EFFECT
    )


def read(json: Json, tensors: Collection[str]) -> EncoderConfig:
    """The EncoderConfig of a config.json."""
    return EncoderConfig(
        **read_common(json, tensors),
        vocab_size=json["vocab_size"],
        num_positions=json["max_position_embeddings"],
        token_types=json["type_vocab_size"],
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
