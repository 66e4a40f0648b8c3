"""The record of BART."""

from __future__ import annotations

from jaxft.models.hf_encoder_decoders import READS, Form, encoder_decoder_family, keys
from jaxft.models.special_ids import SpecialIds

_NULLABLE = READS - {"vocab_size", "max_position_embeddings", "tie_word_embeddings"}

BART = encoder_decoder_family(
    "bart",
    "BartForConditionalGeneration",
    Form(),
    keys(*_NULLABLE, decoder_start_token_id=2),
    SpecialIds(bos=0, eos=(2,), pad=1),
)
