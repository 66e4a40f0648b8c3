"""The record of Gemma."""

from __future__ import annotations

from jaxft.models import names
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, HuggingFace
from jaxft.models.gemma import config

GEMMA = Family(
    name="gemma",
    module=Decoder,
    huggingface=HuggingFace(
        architecture="GemmaForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.READS,
        entries=names.decoder_entries,
        rename=names.with_prefix("model."),
        ignores=names.decoder_ignores,
    ),
)
