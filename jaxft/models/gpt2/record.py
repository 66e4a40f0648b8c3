"""The record of GPT-2."""

from __future__ import annotations

from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf, HuggingFace
from jaxft.models.gpt2 import config, names
from jaxft.models.names import with_prefix
from jaxft.models.special_ids import SpecialIds

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
        special=SpecialIds(bos=50256, eos=(50256,)),
    ),
    gguf=Gguf(
        architecture="gpt2",
        read=config.read_gguf,
        write=config.write_gguf,
        reads=config.GGUF_READS,
        entries=names.gguf_entries,
        float32=frozenset({names.GGUF_POSITIONS}),
    ),
)
