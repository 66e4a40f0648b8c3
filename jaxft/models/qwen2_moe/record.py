"""The record of Qwen 1.5 and 2 with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, hf_experts
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json

_SHARED = "shared_expert_intermediate_size"
_READS = hf_config.WINDOW_READS | {
    "hidden_act",
    "use_sliding_window",
    "max_window_layers",
    "qkv_bias",
    _SHARED,
}


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    uses, until = json["use_sliding_window"], json["max_window_layers"]
    window = json["sliding_window"] if uses else None
    local = lambda layer: bool(uses) and layer % 2 == 0 and layer < until
    return dataclasses.replace(
        hf_config.read_decoder(json, "qwen2_moe", json["hidden_act"]),
        attention_bias=json["qkv_bias"],
        windows=hf_config.read_windows(json, window, local),
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
    return (
        hf_config.write_decoder(config)
        | hf_config.write_windows(config)
        | hf_experts.write_qwen(config)
        | {
            "use_sliding_window": any(config.windows),
            "qkv_bias": config.attention_bias,
            _SHARED: config.experts.shared_width,
        }
    )


QWEN2_MOE = Family(
    name="qwen2_moe",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen2MoeForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_experts.QWEN_READS | _READS,
        keys=dataclasses.replace(
            hf_config.decoder_keys(
                "num_key_value_heads",
                "sliding_window",
                "mlp_only_layers",
                **hf_config.sizes(2048, 5632, 24, 16, 32768),
                **hf_experts.keys(60, 4, 0.001),
                vocab_size=151936,
                num_key_value_heads=16,
                hidden_act="silu",
                use_sliding_window=False,
                sliding_window=4096,
                max_window_layers=28,
                decoder_sparse_step=1,
                moe_intermediate_size=1408,
                norm_topk_prob=False,
                mlp_only_layers=None,
                qkv_bias=True,
                layer_types=None,
                **{_SHARED: 5632},
            ),
            no_effect=hf_experts.NO_EFFECT,
        ),
    ),
)
