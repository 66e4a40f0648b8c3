"""The record of DeepSeek-V3: DeepSeek-AI, 2024, arxiv.org/abs/2412.19437."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.deepseek_v2 import config as deepseek
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.special_ids import SpecialIds

_NEEDED = ("num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "v_head_dim")
# Of the files' own keys that transformers does not read: what they must be.
_METHOD = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    for name, expected in _METHOD.items():
        if json.get(name, expected) != expected:
            raise CheckpointError(
                f"config.json: {name} is {json[name]!r}, expected {expected!r}, the one of deepseek_v3."
            )
    config = deepseek.read(
        json,
        "deepseek_v3",
        _NEEDED,
        normalised=bool(json["norm_topk_prob"]),
        sigmoid=True,
        correction=True,
        groups=json["n_group"] or 1,
        chosen_groups=json["topk_group"] or 1,
        group_best=2,
    )
    latent = dataclasses.replace(config.latent, interleaved=bool(json["rope_interleave"]))
    return dataclasses.replace(config, latent=latent)


def _write(config: DecoderConfig) -> dict[str, Any]:
    return deepseek.write(config) | {
        "norm_topk_prob": config.experts.normalised,
        "rope_interleave": config.latent.interleaved,
    }


def _ignores(name: str, config: DecoderConfig) -> bool:
    """Layers beyond the last predict further tokens; transformers ignores them too."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    beyond = layer is not None and int(layer[1]) >= config.num_layers
    return beyond or names.decoder_ignores(name, config)


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="DeepseekV3ForCausalLM",
        read=_read,
        write=_write,
        reads=deepseek.READS | {"norm_topk_prob", "rope_interleave", *_METHOD},
        special=SpecialIds(bos=0, eos=(1,)),
        ignores=_ignores,
        keys=deepseek.keys(
            *_NEEDED,
            "num_key_value_heads",
            "norm_topk_prob",
            "rope_interleave",
            no_effect={"num_mtp_layers"},
            aliases={
                "num_local_experts": "n_routed_experts",
                "num_nextn_predict_layers": "num_mtp_layers",
            },
            **hf_config.sizes(7168, 18432, 61, 128, 4096),
            vocab_size=129280,
            num_key_value_heads=128,
            attention_bias=False,
            first_k_dense_replace=3,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_interleave=True,
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            routed_scaling_factor=2.5,
        ),
        entries=deepseek.entries,
    ),
)
