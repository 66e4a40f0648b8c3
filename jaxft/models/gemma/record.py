"""The record of Gemma."""

from __future__ import annotations

from jaxft.models import hf_config
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family
from jaxft.models.gemma import config

GEMMA = Family(
    name="gemma",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="GemmaForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.OWN_READS,
        keys=config.keys(
            **hf_config.sizes(3072, 24576, 28, 16, 8192),
            vocab_size=256000,
            num_key_value_heads=16,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation=None,
        ),
    ),
)
