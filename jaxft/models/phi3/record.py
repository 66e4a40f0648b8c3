"""The record of Phi-3 and Phi-4: fused projections, LongRoPE, and rotary positions in a part of each head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, hf_rope, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.special_ids import SpecialIds

FUSED = {
    "self_attn.qkv_proj": ("attention/query", "attention/key", "attention/value"),
    "self_attn.o_proj": ("attention/out",),
    "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
    "mlp.down_proj": ("mlp/down",),
}


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    parameters = json["rope_scaling"] or json["rope_parameters"] or {}
    if parameters.get("rope_type", parameters.get("type")) in ("su", "yarn"):
        parameters = {**parameters, "rope_type": "longrope"}  # early files have these names
    rope = hf_rope.read_rope(json, parameters, partial=True)
    if rope.scaling not in ("default", "longrope"):
        raise CheckpointError(
            f"config.json: rope scaling {rope.scaling!r} is not one of phi3's; expected longrope or none."
        )
    window = json["sliding_window"]
    windows = () if window is None else (window,) * json["num_hidden_layers"]
    if window is not None and window < 1:
        raise CheckpointError(
            f"config.json: sliding_window is {window}, expected 1 or more, or null."
        )
    config = hf_config.read_decoder(json, "phi3", json["hidden_act"], rope)
    return dataclasses.replace(config, windows=windows)


def _write(config: DecoderConfig) -> dict[str, Any]:
    json = hf_config.write_decoder(config)
    scaling = json["rope_scaling"]
    if scaling is not None:
        # As in the files of transformers 4, which rejects other keys in it.
        json["rope_scaling"] = scaling | {"type": "longrope"}
    return json | {
        "original_max_position_embeddings": config.rope.original_max_length,
        "partial_rotary_factor": config.rope.share,
        "sliding_window": config.shared_window,
    }


PHI3 = Family(
    name="phi3",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Phi3ForCausalLM",
        read=_read,
        write=_write,
        entries=functools.partial(names.decoder_entries, linear=FUSED),
        reads=hf_config.READS | {"hidden_act", "sliding_window", "partial_rotary_factor"},
        special=SpecialIds(bos=1, eos=(32000,), pad=32000),
        keys=hf_config.decoder_keys(
            **hf_config.sizes(3072, 8192, 32, 32, 4096)
            | {
                "vocab_size": 32064,
                "rms_norm_eps": 1e-5,
                "original_max_position_embeddings": 4096,
            },
            num_key_value_heads=None,
            hidden_act="silu",
            sliding_window=None,
            partial_rotary_factor=1.0,
        ),
    ),
)
