"""The record of Mixtral."""

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

_COUNT, _WIDTH = "num_local_experts", "intermediate_size"


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    window = json["sliding_window"]
    if window is not None and window < 1:
        raise CheckpointError(
            f"config.json: sliding_window is {window}, expected tokens, or null for no window."
        )
    return dataclasses.replace(
        hf_config.read_decoder(json, "mixtral", json["hidden_act"]),
        windows=() if window is None else (window,) * json["num_hidden_layers"],
        experts=hf_experts.read_experts(json, _COUNT, _WIDTH, normalised=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    experts = hf_experts.write_experts(config, _COUNT, _WIDTH)
    return hf_config.write_decoder(config) | {"sliding_window": config.shared_window} | experts


MIXTRAL = Family(
    name="mixtral",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="MixtralForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS | hf_experts.READS | {"hidden_act", "sliding_window", _COUNT},
        special=SpecialIds(bos=1, eos=(2,)),
        keys=dataclasses.replace(
            hf_config.decoder_keys(
                **hf_config.sizes(4096, 14336, 32, 32, 131072),
                **hf_experts.keys(8, 2, 0.001, _COUNT),
                num_key_value_heads=8,
                rms_norm_eps=1e-5,
                hidden_act="silu",
                sliding_window=None,
                rope_theta=1e6,
            ),
            no_effect=hf_experts.NO_EFFECT,
            aliases={"num_experts": _COUNT},
        ),
        entries=functools.partial(
            names.decoder_entries,
            experts=functools.partial(
                names.expert_entries,
                names=names.ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
            ),
        ),
        module=lambda name: name.replace(".block_sparse_moe.", ".mlp."),
    ),
)
