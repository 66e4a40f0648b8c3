"""The record of Whisper (Radford et al., 2022, arxiv.org/abs/2212.04356)."""

from __future__ import annotations

from jaxft.models.encoder_decoder import EncoderDecoder
from jaxft.models.family import Family, HuggingFace
from jaxft.models.hf_encoder_decoders import LAYERS
from jaxft.models.special_ids import SpecialIds
from jaxft.models.whisper import config, names

WHISPER = Family(
    name="whisper",
    module=EncoderDecoder,
    huggingface=HuggingFace(
        architecture="WhisperForConditionalGeneration",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.KEYS,
        entries=names.entries,
        rename=names.rename,
        ignores=names.ignores,
        head="proj_out",
        task_type="SEQ_2_SEQ_LM",
        untyped=True,
        special=SpecialIds(bos=50256, eos=(50256,), pad=50256),
    ),
    layers=LAYERS,
)
