"""config.json and tensor names of DeepSeek-V2: the parts that V3 shares."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import ChainMap
from collections.abc import Collection, Mapping
from typing import Any

from jaxft.models import hf_config, hf_experts, names
from jaxft.models.config import DecoderConfig, Experts, Latent, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_keys import Keys
from jaxft.models.names import Entry

_COUNT, _WIDTH = "n_routed_experts", "moe_intermediate_size"
_LATENT = {
    "kv_lora_rank": "rank",
    "q_lora_rank": "query_rank",
    "qk_nope_head_dim": "plain",
    "qk_rope_head_dim": "turned",
    "v_head_dim": "value",
}
READS = (hf_config.READS - {"head_dim"}) | {
    "hidden_act",
    "attention_bias",
    "num_experts_per_tok",
    "n_shared_experts",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "moe_layer_freq",
    "router_aux_loss_coef",
    "n_group",
    "topk_group",
    _COUNT,
    _WIDTH,
    *_LATENT,
}


def keys(
    *nullable: str, aliases: Mapping[str, str], no_effect: Collection[str] = (), **defaults: Any
) -> Keys:
    """The keys of the classes of DeepSeek-V2 and V3; `defaults` are specific to one of them."""
    known = hf_config.decoder_keys("q_lora_rank", *nullable, hidden_act="silu", **defaults)
    # It follows from qk_rope_head_dim, whatever a file says.
    known.defaults.pop("head_dim")
    no_effect = hf_experts.NO_EFFECT | {"head_dim", *no_effect}
    return dataclasses.replace(known, no_effect=no_effect, aliases=aliases)


def read(json: Json, family: str, needed: Collection[str], **experts: Any) -> DecoderConfig:
    """The DecoderConfig of a config.json.

    Args:
        json: the file, with defaults for absent keys.
        family: the config's.
        needed: keys that may not be null, although transformers' class allows it.
        experts: more fields of the Experts.

    Raises:
        CheckpointError: for values that no model can have, and heads that share keys.
    """
    for name in needed:
        if json[name] is None:
            raise CheckpointError(f"config.json: {name} is null, expected a number.")
    heads, groups = json["num_attention_heads"], json["num_key_value_heads"]
    if groups not in (None, heads):
        raise CheckpointError(
            f"config.json: num_key_value_heads is {groups}, expected num_attention_heads ({heads}): latent "
            "attention has keys for each head."
        )
    if json.get("moe_layer_freq", 1) != 1:
        raise CheckpointError(
            f"config.json: moe_layer_freq is {json['moe_layer_freq']!r}, expected 1: transformers has "
            "experts in every layer from first_k_dense_replace on."
        )
    first, layers = json["first_k_dense_replace"], json["num_hidden_layers"]
    if first >= layers:
        raise CheckpointError(
            f"config.json: first_k_dense_replace is {first}, so that none of {layers} layers has experts."
        )
    json = ChainMap(
        {"head_dim": json["qk_rope_head_dim"]}, json
    )  # a view: a Json need not be a dict
    config = hf_config.read_decoder(json, family, json["hidden_act"])
    latent = Latent(**{ours: json[name] for name, ours in _LATENT.items()})
    latent = dataclasses.replace(latent, mscale=_mscale(json, config.rope))
    return dataclasses.replace(
        config,
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        attention_scale=_scale(latent, config.rope),
        latent=latent,
        experts=_experts(json, dense_layers=tuple(range(first)), **experts),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The keys that V2 and V3 share."""
    moe, latent = config.experts, config.latent
    json = hf_config.write_decoder(config)
    json.pop("head_dim")
    if latent.mscale:
        grown = {"mscale_all_dim": latent.mscale}
        json |= {name: json[name] | grown for name in ("rope_scaling", "rope_parameters")}
    return (
        json
        | {name: getattr(latent, ours) for name, ours in _LATENT.items()}
        | {
            _COUNT: moe.count,
            _WIDTH: moe.width,
            "num_experts_per_tok": moe.per_token,
            "n_shared_experts": moe.shared_width // moe.width,
            "routed_scaling_factor": moe.scale,
            "first_k_dense_replace": len(moe.dense_layers),
            "n_group": moe.groups,
            "topk_group": moe.chosen_groups,
            "attention_bias": config.attention_bias,
        }
    )


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a file and the leaves that they hold."""
    query = {"q_proj": "query"}
    norms = {"kv_a_layernorm": "latent_norm"}
    if config.latent.query_rank is not None:
        query = {"q_a_proj": "query_down", "q_b_proj": "query_up"}
        norms |= {"q_a_layernorm": "query_norm"}
    query |= {"kv_a_proj_with_mqa": "latent", "kv_b_proj": "latent_up", "o_proj": "out"}
    mlp = {name: paths for name, paths in names.LINEAR.items() if name.startswith("mlp.")}
    return names.decoder_entries(
        config,
        norms=names.NORMS | {f"self_attn.{n}": f"attention/{path}" for n, path in norms.items()},
        experts=functools.partial(
            names.expert_entries, names=names.EXPERTS._replace(shared="shared_experts")
        ),
        linear={f"self_attn.{n}": (f"attention/{path}",) for n, path in query.items()} | mlp,
    )


def _experts(json: Json, **more: Any) -> Experts:
    scale = json["routed_scaling_factor"]
    if not abs(scale) < math.inf:
        raise CheckpointError(
            f"config.json: routed_scaling_factor is {scale}, expected a finite number."
        )
    return hf_experts.read_experts(
        json,
        _COUNT,
        _WIDTH,
        scale=float(scale),
        shared_width=json["n_shared_experts"] * json[_WIDTH],
        shared_gate=False,
        **more,
    )


def _mscale(json: Json, rope: Rope) -> float:
    """mscale_all_dim of the rotary parameters, which transformers reads for any scaling."""
    parameters = json["rope_scaling"] or json["rope_parameters"] or {}
    mscale = parameters.get("mscale_all_dim") or 0.0
    if rope.scaling == "default":
        return 0.0
    if not isinstance(mscale, (int, float)) or not abs(mscale) < math.inf:
        raise CheckpointError(f"config.json: mscale_all_dim is {mscale!r}, expected a number.")
    return float(mscale)


def _scale(latent: Latent, rope: Rope) -> float:
    """K^-1/2 (0.1 m ln s + 1)^2 for YaRN's factor s, which sharpens attention over longer contexts."""
    grown = 0.1 * latent.mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return latent.size**-0.5 * grown * grown if latent.mscale else latent.size**-0.5
