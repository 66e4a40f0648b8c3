"""The record of Llama: what decoders share is Llama's."""

from __future__ import annotations

import functools

from jaxft.models import gguf, hf_config
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Gguf
from jaxft.models.special_ids import SpecialIds

LLAMA = Family(
    name="llama",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="LlamaForCausalLM",
        read=lambda json, tensors: hf_config.read_decoder(json, "llama"),
        write=hf_config.write_decoder,
        reads=hf_config.READS,
        special=SpecialIds(bos=1, eos=(2,)),
    ),
    gguf=Gguf(
        architecture="llama",
        read=lambda header: gguf.read_gguf_decoder(header, "llama"),
        reads=gguf.READS,
        # llama.cpp's converter permutes the rows of queries and keys for its rotary order.
        entries=functools.partial(gguf.gguf_decoder_entries, permuted=True),
    ),
)
