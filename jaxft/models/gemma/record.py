"""The record of Gemma."""

from __future__ import annotations

import functools

from jaxft.models import gguf, hf_config
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf
from jaxft.models.gemma import config
from jaxft.models.special_ids import SpecialIds

GEMMA = Family(
    name="gemma",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="GemmaForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.OWN_READS,
        special=SpecialIds(bos=2, eos=(1,), pad=0),
        keys=config.keys(
            **hf_config.sizes(3072, 24576, 28, 16, 8192),
            vocab_size=256000,
            num_key_value_heads=16,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation=None,
        ),
    ),
    gguf=Gguf(
        architecture="gemma",
        read=config.read_gguf,
        write=gguf.write_gguf_decoder,
        reads=gguf.READS,
        # Its files hold 1 + scale.
        entries=functools.partial(gguf.gguf_decoder_entries, offset=1.0),
    ),
)
