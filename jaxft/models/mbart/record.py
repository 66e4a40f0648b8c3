"""The record of mBART."""

from __future__ import annotations

from jaxft.models.hf_encoder_decoders import Form, encoder_decoder_family, keys
from jaxft.models.special_ids import SpecialIds

MBART = encoder_decoder_family(
    "mbart",
    "MBartForConditionalGeneration",
    Form(pre_norm=True, final_norm=True),
    keys(),
    SpecialIds(bos=0, eos=(2,), pad=1),
)
