"""The record of DeepSeek-V2: DeepSeek-AI, 2024, arxiv.org/abs/2405.04434."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.deepseek_v2 import config as deepseek
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.hf_keys import check_multiple
from jaxft.models.special_ids import SpecialIds

_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    method, needed = json["topk_method"], ["num_experts_per_tok"]
    if method not in (_GREEDY, _LIMITED) or json.get("scoring_func", "softmax") != "softmax":
        raise CheckpointError(
            f"config.json: topk_method is {method!r} and scoring_func {json.get('scoring_func')!r}; jaxft's "
            f"deepseek_v2 has {_GREEDY!r} and {_LIMITED!r} of softmax scores."
        )
    check_multiple(json, "hidden_size", "num_attention_heads")
    groups = {}
    if method == _LIMITED:
        needed += ["n_group", "topk_group"]
        groups = {"groups": json["n_group"] or 1, "chosen_groups": json["topk_group"] or 1}
    return deepseek.read(json, "deepseek_v2", needed, normalised=False, **groups)


def _write(config: DecoderConfig) -> dict[str, Any]:
    return deepseek.write(config) | {
        "topk_method": _GREEDY if config.experts.groups == 1 else _LIMITED
    }


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="DeepseekV2ForCausalLM",
        read=_read,
        write=_write,
        reads=deepseek.READS | {"topk_method", "scoring_func"},
        special=SpecialIds(bos=1, eos=(2,)),
        keys=deepseek.keys(
            "topk_method",
            aliases={"num_experts": "n_routed_experts"},
            **hf_config.sizes(4096, 11008, 32, 32, 2048),
            vocab_size=102400,
            num_key_value_heads=None,
            attention_bias=False,
            mlp_bias=False,
            first_k_dense_replace=0,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_group=None,
            topk_group=None,
            topk_method=_GREEDY,
            # transformers ignores it; the model's own code divides.
            norm_topk_prob=False,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=None,
            moe_intermediate_size=1407,
            routed_scaling_factor=1.0,
        ),
        entries=deepseek.entries,
    ),
)
