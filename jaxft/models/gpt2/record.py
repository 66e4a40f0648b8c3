"""The record of GPT-2."""

from __future__ import annotations

from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, HuggingFace
from jaxft.models.gpt2 import config, names
from jaxft.models.names import with_prefix

GPT2 = Family(
    name="gpt2",
    module=Decoder,
    huggingface=HuggingFace(
        architecture="GPT2LMHeadModel",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.KEYS,
        entries=names.entries,
        rename=with_prefix("transformer."),
        ignores=names.ignores,
    ),
)
