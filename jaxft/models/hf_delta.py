"""config.json of decoders with Gated DeltaNets: the keys that Qwen3-Next and Qwen3.5 share."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig, Delta
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_keys import Keys, check_multiple
from jaxft.models.hf_rope import FULL, read_rope

LINEAR = "linear_attention"
_SIZES = {
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_key_head_dim": "key_size",
    "linear_value_head_dim": "value_size",
    "linear_conv_kernel_dim": "taps",
}
READS = hf_config.READS | {
    "hidden_act",
    "attention_bias",
    "layer_types",
    "full_attention_interval",
    "partial_rotary_factor",
    *_SIZES,
}


def keys(*nullable: str, **defaults: Any) -> Keys:
    """The keys of the classes of Qwen3-Next and Qwen3.5; `defaults` are specific to one of them."""
    return hf_config.decoder_keys(
        *nullable,
        hidden_act="silu",
        head_dim=256,
        attention_bias=False,
        layer_types=None,
        full_attention_interval=4,  # not a field of transformers' class, but an argument
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        **{"partial_rotary_factor": 0.25, **defaults},
    )


def read(json: Json, family: str, *, joined: bool = False) -> DecoderConfig:
    """The DecoderConfig of a config.json, without experts.

    Args:
        json: the file, with defaults for absent keys.
        family: the config's.
        joined: whether the projections of a Gated DeltaNet are ordered by key heads.

    Raises:
        CheckpointError: for values that no model can have, and other kinds of layers.
    """
    check_multiple(json, "linear_num_value_heads", "linear_num_key_heads")
    rope = read_rope(json, partial=True)
    sizes = {ours: json[name] for name, ours in _SIZES.items()}
    return dataclasses.replace(
        hf_config.read_decoder(json, family, json["hidden_act"], rope),
        norm_offset=1.0,
        qk_norm=True,
        gated_attention=True,
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
        delta=Delta(layers=_layers(json), joined=joined, **sizes),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    kinds = [LINEAR if config.has_state(i) else FULL for i in range(config.num_layers)]
    return hf_config.write_decoder(config) | {
        "partial_rotary_factor": config.rope.share,
        "attention_bias": config.attention_bias,
        "layer_types": kinds,
        **{name: getattr(config.delta, ours) for name, ours in _SIZES.items()},
    }


def rename(name: str) -> str:
    """The name of a tensor of Qwen3.5, whose files may say "model.language_model." for "model."."""
    return names.with_prefix("model.")(name.replace("model.language_model.", "model.", 1))


def ignores(name: str, config: DecoderConfig) -> bool:
    """Returns whether a tensor is not needed: of the part that predicts further tokens, a buffer, a copy."""
    further = name.removeprefix("model.").startswith("mtp.")
    return further or names.decoder_ignores(name, config)


def _layers(json: Json) -> tuple[int, ...]:
    count, kinds, every = (
        json["num_hidden_layers"],
        json["layer_types"],
        json["full_attention_interval"],
    )
    if kinds is None:
        kinds = [LINEAR if (i + 1) % every else FULL for i in range(count)]
    if len(kinds) != count or not all(kind in (FULL, LINEAR) for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}, expected one of {FULL!r} and {LINEAR!r} for each of the "
            f"{count} layers."
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == LINEAR)
