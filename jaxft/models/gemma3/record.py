"""The record of Gemma 3's text model."""

from __future__ import annotations

import functools

from jaxft.models import gguf, hf_config, names
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf
from jaxft.models.gemma2 import config as gemma2
from jaxft.models.gemma2.names import GGUF_NORMS, NORMS
from jaxft.models.gemma3 import config
from jaxft.models.special_ids import SpecialIds

GEMMA3 = Family(
    name="gemma3_text",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Gemma3ForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=gemma2.keys(
            **hf_config.sizes(2304, 9216, 26, 8, 131072),
            vocab_size=262208,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            rope_theta=config.THETA,
            rope_local_base_freq=config.LOCAL_THETA,
            sliding_window_pattern=6,
        ),
        entries=functools.partial(names.decoder_entries, norms=NORMS | names.QK_NORMS),
        special=SpecialIds(bos=2, eos=(1,), pad=0),
    ),
    gguf=Gguf(
        architecture="gemma3",
        read=config.read_gguf,
        write=config.write_gguf,
        reads=config.GGUF_READS,
        # Its files hold 1 + scale.
        entries=functools.partial(
            gguf.gguf_decoder_entries, norms=GGUF_NORMS | gguf.QK_NORMS, offset=1.0
        ),
    ),
)
