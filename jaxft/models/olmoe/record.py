"""The record of OLMoE: Muennighoff et al., 2024, arxiv.org/abs/2409.02060."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, hf_experts, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.special_ids import SpecialIds

_READS = frozenset({"hidden_act", "attention_bias", "clip_qkv", "num_experts", "norm_topk_prob"})


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    clip = json["clip_qkv"]
    if clip is not None and not 0 < clip < float("inf"):
        raise CheckpointError(
            f"config.json: clip_qkv is {clip}, expected a positive number or null."
        )
    return dataclasses.replace(
        hf_config.read_decoder(json, "olmoe", json["hidden_act"]),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        qk_norm=True,
        qk_norm_whole=True,
        clip_qkv=clip,
        experts=hf_experts.read_experts(
            json, "num_experts", "intermediate_size", normalised=json["norm_topk_prob"]
        ),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return (
        hf_config.write_decoder(config)
        | hf_experts.write_experts(config, "num_experts", "intermediate_size")
        | {
            "attention_bias": config.attention_bias,
            "clip_qkv": config.clip_qkv,
            "norm_topk_prob": config.experts.normalised,
        }
    )


OLMOE = Family(
    name="olmoe",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="OlmoeForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_experts.READS | _READS,
        special=SpecialIds(eos=(50279,), pad=1),
        keys=dataclasses.replace(
            hf_config.decoder_keys(
                **hf_config.sizes(2048, 2048, 16, 16, 4096),
                **hf_experts.keys(64, 8, 0.01),
                vocab_size=50304,
                num_key_value_heads=None,
                rms_norm_eps=1e-5,
                hidden_act="silu",
                attention_bias=False,
                clip_qkv=None,
                norm_topk_prob=False,
            ),
            no_effect=hf_experts.NO_EFFECT,
            aliases={"num_local_experts": "num_experts"},
        ),
        entries=functools.partial(names.decoder_entries, norms=names.NORMS | names.QK_NORMS),
    ),
)
