"""The record of SmolLM3: Llama with some layers without positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.llama.record import read as read_llama
from jaxft.models.llama.record import write as write_llama
from jaxft.models.special_ids import SpecialIds


def _read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    layers = json["num_hidden_layers"]
    turns = json["no_rope_layers"]  # despite its name, 1 for layers with rotary positions
    if turns is None:
        turns = [(i + 1) % json["no_rope_layer_interval"] != 0 for i in range(layers)]
    if len(turns) < layers or not all(turn in (0, 1) for turn in turns):
        raise CheckpointError(
            f"config.json: no_rope_layers is {turns!r}, expected 1 (rotary positions) or 0 (none) for each "
            f"of the {layers} layers."
        )
    window = json["sliding_window"] if json["use_sliding_window"] else None
    local = lambda layer: window is not None and not turns[layer]
    return dataclasses.replace(
        read_llama(json, tensors, "smollm3"),
        unrotated=tuple(i for i in range(layers) if not turns[i]),
        windows=hf_config.read_windows(json, window, local),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    turns = [int(i not in config.unrotated) for i in range(config.num_layers)]
    switch = {"use_sliding_window": any(config.windows), "no_rope_layers": turns}
    return write_llama(config) | hf_config.write_windows(config) | switch


SMOLLM3 = Family(
    name="smollm3",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="SmolLM3ForCausalLM",
        read=_read,
        write=_write,
        reads=hf_config.READS
        | hf_config.WINDOW_READS
        | {
            "hidden_act",
            "attention_bias",
            "mlp_bias",
            "use_sliding_window",
            "no_rope_layers",
            "no_rope_layer_interval",
        },
        special=SpecialIds(bos=128000, eos=(128001,), pad=128004),
        keys=hf_config.decoder_keys(
            "num_key_value_heads",
            **hf_config.sizes(2048, 11008, 36, 16, 32768)
            | {"vocab_size": 128256, "rope_theta": 2e6, "tie_word_embeddings": True},
            num_key_value_heads=4,
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            layer_types=None,
        ),
    ),
)
