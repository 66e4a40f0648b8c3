"""The record of Gemma 2."""

from __future__ import annotations

import functools

from jaxft.models import gguf, hf_config, names
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf
from jaxft.models.gemma2 import config
from jaxft.models.gemma2.names import GGUF_NORMS, NORMS
from jaxft.models.special_ids import SpecialIds

GEMMA2 = Family(
    name="gemma2",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Gemma2ForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.keys(
            **hf_config.sizes(2304, 9216, 26, 8, 8192),
            vocab_size=256000,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        entries=functools.partial(names.decoder_entries, norms=NORMS),
        special=SpecialIds(bos=2, eos=(1,), pad=0),
    ),
    gguf=Gguf(
        architecture="gemma2",
        read=config.read_gguf,
        write=config.write_gguf,
        reads=config.GGUF_READS,
        # Its files hold 1 + scale.
        entries=functools.partial(gguf.gguf_decoder_entries, norms=GGUF_NORMS, offset=1.0),
    ),
)
