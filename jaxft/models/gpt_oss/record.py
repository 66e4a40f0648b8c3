"""The record of gpt-oss: OpenAI, 2025, arxiv.org/abs/2508.10925."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, hf_experts, names
from jaxft.models.config import DecoderConfig, Experts
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.hf_rope import read_rope
from jaxft.models.names import Entry

_COUNT, _WIDTH = "num_local_experts", "intermediate_size"
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
_READS = hf_config.WINDOW_READS | {"hidden_act", "attention_bias", _COUNT, *_SWIGLU}
# Of files without any rotary parameters.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    absent = not json["rope_scaling"] and json["rope_parameters"] is None
    alpha, limit = (json[name] for name in _SWIGLU)
    for name in _SWIGLU:
        if not 0 < json[name] < float("inf"):
            raise CheckpointError(
                f"config.json: {name} is {json[name]}, expected a positive number."
            )
    rope = read_rope(json, _YARN) if absent else read_rope(json)
    return dataclasses.replace(
        hf_config.read_decoder(json, "gpt_oss", json["hidden_act"], rope),
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        sinks=True,
        windows=hf_config.read_windows(json, json["sliding_window"], lambda layer: layer % 2 == 0),
        experts=hf_experts.read_experts(
            json,
            _COUNT,
            _WIDTH,
            normalised=True,
            bias=True,
            interleaved=True,
            swiglu=(float(alpha), float(limit)),
        ),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return (
        hf_config.write_decoder(config)
        | hf_config.write_windows(config)
        | hf_experts.write_experts(config, _COUNT, _WIDTH)
        | {"attention_bias": config.attention_bias}
        | dict(zip(_SWIGLU, config.experts.swiglu, strict=True))
    )


def _entries(config: DecoderConfig) -> list[Entry]:
    sinks = [
        Entry(f"model.layers.{i}.self_attn.sinks", (f"layers/{i}/attention/sinks",))
        for i in range(config.num_layers)
    ]
    return names.decoder_entries(config, experts=_expert_entries) + sinks


def _expert_entries(experts: Experts, theirs: str, ours: str) -> list[Entry]:
    """A tensor for all experts of a layer, [E, in, out] as here."""
    router = f"{ours}mlp/router"
    entries = [
        Entry(f"{theirs}mlp.router.weight", (f"{router}/kernel",), True),
        Entry(f"{theirs}mlp.router.bias", (f"{router}/bias",)),
    ]
    for name in ("gate_up", "down"):
        parameter, path = f"{theirs}mlp.experts.{name}_proj", f"{ours}mlp/experts/{name}"
        entries.append(Entry(parameter, (f"{path}/kernel",)))
        entries.append(Entry(f"{parameter}_bias", (f"{path}/bias",)))
    return entries


GPT_OSS = Family(
    name="gpt_oss",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="GptOssForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_experts.READS | _READS,
        keys=dataclasses.replace(
            hf_config.decoder_keys(
                "sliding_window",
                **hf_config.sizes(2880, 2880, 36, 64, 131072),
                **hf_experts.keys(128, 4, 0.001, _COUNT),
                **_SWIGLU,
                vocab_size=201088,
                num_key_value_heads=8,
                head_dim=64,
                rms_norm_eps=1e-5,
                rope_theta=150000.0,
                hidden_act="silu",
                attention_bias=True,
                sliding_window=128,
                layer_types=None,
            ),
            no_effect=hf_experts.NO_EFFECT,
            aliases={"num_experts": _COUNT},
        ),
        entries=_entries,
    ),
)
