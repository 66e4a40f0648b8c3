"""The record of Qwen3-Next: Qwen team, 2025, huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, hf_delta, hf_experts, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json

_SHARED = "shared_expert_intermediate_size"


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    return dataclasses.replace(
        hf_delta.read(json, "qwen3_next", joined=True),
        experts=hf_experts.read_experts(
            json,
            "num_experts",
            "moe_intermediate_size",
            normalised=json["norm_topk_prob"],
            shared_width=json[_SHARED],
            dense_layers=hf_experts.dense_layers(json),
        ),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    shared = {_SHARED: config.experts.shared_width}
    return hf_delta.write(config) | hf_experts.write_qwen(config) | shared


QWEN3_NEXT = Family(
    name="qwen3_next",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen3NextForCausalLM",
        read=_read,
        write=_write,
        reads=hf_delta.READS | hf_experts.QWEN_READS | {_SHARED},
        ignores=hf_delta.ignores,
        keys=dataclasses.replace(
            hf_delta.keys(
                "mlp_only_layers",
                **hf_config.sizes(2048, 5632, 48, 16, 32768),
                **hf_experts.keys(512, 10, 0.001),
                vocab_size=151936,
                num_key_value_heads=2,
                decoder_sparse_step=1,
                moe_intermediate_size=512,
                norm_topk_prob=True,
                mlp_only_layers=None,
                **{_SHARED: 512},
            ),
            no_effect=hf_experts.NO_EFFECT,
        ),
        entries=functools.partial(names.decoder_entries, norms=names.NORMS | names.QK_NORMS),
    ),
)
