"""config.json of Qwen 2 and 3: windows on the upper layers, enabled by a separate key."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.family import Json
from jaxft.models.hf_keys import Keys

READS = (
    hf_config.READS
    | hf_config.WINDOW_READS
    | {"hidden_act", "use_sliding_window", "max_window_layers"}
)


def keys(**defaults: Any) -> Keys:
    """The keys of the classes of Qwen 2 and 3; `defaults` are specific to one of them."""
    return hf_config.decoder_keys(
        "num_key_value_heads",
        "sliding_window",
        **hf_config.sizes(4096, 22016, 32, 32, 32768),
        vocab_size=151936,
        num_key_value_heads=32,
        hidden_act="silu",
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
        layer_types=None,
        **defaults,
    )


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json. The family determines which projections have biases."""
    windows = read_qwen_windows(json)
    config = hf_config.read_decoder(json, "qwen2", json["hidden_act"])
    return dataclasses.replace(config, attention_bias=True, windows=windows)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig, without biases."""
    switch = {"use_sliding_window": any(config.windows)}
    return hf_config.write_decoder(config) | hf_config.write_windows(config) | switch


def read_qwen_windows(json: Json) -> hf_config.Windows:
    """The windows: layers from max_window_layers on have one if use_sliding_window is set."""
    window = json["sliding_window"] if json["use_sliding_window"] else None
    local = lambda layer: window is not None and layer >= json["max_window_layers"]
    return hf_config.read_windows(json, window, local)
