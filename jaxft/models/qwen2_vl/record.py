"""The record of Qwen2-VL (Wang et al., 2024, arxiv.org/abs/2409.12191); videos are not read."""

from __future__ import annotations

import functools
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family
from jaxft.models.grid_vision import GridTower
from jaxft.models.hf_keys import COMMON, Keys
from jaxft.models.qwen2_5_vl.record import (
    KEYS,
    READS,
    TARGETS,
    common_fields,
    entries,
    read,
    read_vision,
    rename,
    write_with,
)

_VISION_READS = frozenset(
    "depth embed_dim hidden_size hidden_act mlp_ratio num_heads in_channels patch_size spatial_merge_size "
    "temporal_patch_size rope_parameters".split()
)
_VISION_KEYS = Keys(
    COMMON
    | {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,  # of the embeddings
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "rope_parameters": None,
    },
    unchecked=frozenset({"patch_size", "temporal_patch_size", "rope_parameters"}),
    no_effect=frozenset({"tie_word_embeddings"}),
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "depth"},
)


def _read_tower(json, config):
    vision = read_vision(json, _VISION_KEYS, _VISION_READS, "hidden_size", config.hidden_size)
    fields = common_fields(vision)
    return GridTower(
        hidden_size=vision["embed_dim"],
        intermediate_size=vision["embed_dim"] * vision["mlp_ratio"],
        token=json["image_token_id"],
        width=config.hidden_size,
        full_layers=tuple(range(vision["depth"])),
        window=fields["patch_size"] * fields["merge"],  # No layer has windows.
        gated_mlp=False,
        norm="layer",
        **fields,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with a tower."""
    (tower,) = config.towers
    own = {
        "embed_dim": tower.hidden_size,
        "hidden_size": tower.width,
        "mlp_ratio": tower.intermediate_size // tower.hidden_size,
    }
    return write_with(config, own)


QWEN2_VL = Family(
    name="qwen2_vl",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen2VLForConditionalGeneration",
        read=functools.partial(read, family="qwen2_vl", read_tower=_read_tower),
        write=write,
        reads=READS,
        keys=KEYS,
        entries=entries,
        rename=rename,
    ),
    targets=TARGETS,
)
