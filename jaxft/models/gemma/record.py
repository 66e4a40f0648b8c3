"""The record of Gemma."""

from __future__ import annotations

from jaxft.models import hf_config
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family
from jaxft.models.gemma import config
from jaxft.models.special_ids import SpecialIds

GEMMA = Family(
    name="gemma",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="GemmaForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.READS,
        special=SpecialIds(bos=2, eos=(1,), pad=0),
    ),
)
