"""config.json of Qwen 2 and 3: windows on the upper layers, switched on by a key of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.family import Json

READS = hf_config.READS | hf_config.WINDOW_READS | {"use_sliding_window", "max_window_layers"}


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json. Which projections have biases is no key: it is the family's."""
    config = hf_config.read_decoder(json, "qwen2")
    windows = read_qwen_windows(json)
    return dataclasses.replace(config, attention_bias=True, output_bias=False, windows=windows)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig."""
    json = hf_config.write_windowed_decoder(config)
    return json | {"attention_bias": False}


def read_qwen_windows(json: Json) -> tuple[int | None, ...]:
    """The windows, of the layers from max_window_layers on if use_sliding_window is set."""
    first = json.get("max_window_layers", 28)
    return hf_config.read_windows(
        json, lambda layer: json.get("use_sliding_window", False) and layer >= first
    )
