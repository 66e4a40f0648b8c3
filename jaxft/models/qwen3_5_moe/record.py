"""The record of Qwen3.5's text models with experts; jaxft.models.towers reads them from whole models."""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config, hf_delta, hf_experts, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family, Json

_COUNT, _WIDTH, _SHARED = (
    "num_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    # No layer has an MLP of another width. A view: a Json need not be a dict.
    view = ChainMap({"intermediate_size": json[_WIDTH]}, json)
    experts = hf_experts.read_experts(
        json, _COUNT, _WIDTH, normalised=True, shared_width=json[_SHARED]
    )
    return dataclasses.replace(hf_delta.read(view, "qwen3_5_moe_text"), experts=experts)


def _write(config: DecoderConfig) -> dict[str, Any]:
    json = hf_delta.write(config)
    json.pop("intermediate_size")
    shared = {_SHARED: config.experts.shared_width}
    return json | hf_experts.write_experts(config, _COUNT, _WIDTH) | shared


def _keys():
    sizes = hf_config.sizes(2048, 0, 40, 16, 32768)
    sizes.pop("intermediate_size")
    known = hf_delta.keys(
        **sizes,
        **hf_experts.keys(256, 8, 0.001),
        vocab_size=248320,
        num_key_value_heads=2,
        moe_intermediate_size=512,
        **{_SHARED: 512},
    )
    return dataclasses.replace(known, no_effect=hf_experts.NO_EFFECT)


QWEN3_5_MOE = Family(
    name="qwen3_5_moe_text",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen3_5MoeForCausalLM",
        read=_read,
        write=_write,
        reads=(hf_delta.READS - {"intermediate_size"})
        | hf_experts.READS
        | {_COUNT, _WIDTH, _SHARED},
        ignores=hf_delta.ignores,
        rename=hf_delta.rename,
        unpack=names.unpack_experts,
        keys=_keys(),
        entries=functools.partial(names.decoder_entries, norms=names.NORMS | names.QK_NORMS),
    ),
)
