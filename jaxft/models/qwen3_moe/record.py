"""The record of Qwen 3 with experts."""

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

_READS = frozenset({"hidden_act", "use_sliding_window", "sliding_window", "attention_bias"})


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    window = json["sliding_window"] if json["use_sliding_window"] else None
    if window is not None and window < 1:
        raise CheckpointError(
            f"config.json: sliding_window is {window}, expected tokens, or use_sliding_window false."
        )
    return dataclasses.replace(
        hf_config.read_decoder(json, "qwen3_moe", json["hidden_act"]),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        qk_norm=True,
        windows=() if window is None else (window,) * json["num_hidden_layers"],
        experts=hf_experts.read_experts(
            json,
            "num_experts",
            "moe_intermediate_size",
            normalised=json["norm_topk_prob"],
            dense_layers=hf_experts.dense_layers(json),
        ),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return (
        hf_config.write_decoder(config)
        | hf_experts.write_qwen(config)
        | {
            "attention_bias": config.attention_bias,
            "sliding_window": config.shared_window,
            "use_sliding_window": any(config.windows),
        }
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen3MoeForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_experts.QWEN_READS | _READS,
        keys=dataclasses.replace(
            hf_config.decoder_keys(
                "sliding_window",
                "mlp_only_layers",
                **hf_config.sizes(2048, 6144, 24, 32, 32768),
                **hf_experts.keys(128, 8, 0.001),
                vocab_size=151936,
                num_key_value_heads=4,
                hidden_act="silu",
                attention_bias=False,
                use_sliding_window=False,
                sliding_window=4096,
                decoder_sparse_step=1,
                moe_intermediate_size=768,
                norm_topk_prob=False,
                mlp_only_layers=None,
            ),
            no_effect=hf_experts.NO_EFFECT | {"max_window_layers"},
            aliases={"num_local_experts": "num_experts"},
        ),
        entries=functools.partial(names.decoder_entries, norms=names.NORMS | names.QK_NORMS),
    ),
)
