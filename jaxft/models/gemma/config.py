"""config.json of the Gemma families, and the parts common to all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.errors import CheckpointError
from jaxft.models.family import GgufHeader, Json
from jaxft.models.hf_config import read_activation
from jaxft.models.hf_keys import Keys

READS = hf_config.READS | {"attention_bias"}
# Its class has only hidden_act; in transformers 4 it also has hidden_activation.
OWN_READS = READS | {"hidden_act", "hidden_activation"}


def keys(*nullable: str, **defaults: Any) -> Keys:
    """The keys of the classes of all Gemmas; `nullable` and `defaults` are specific to one."""
    common = {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": False,
    }
    return hf_config.decoder_keys(*nullable, **common | defaults)


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of the first Gemma's config.json, whose "gelu" means its approximation by tanh.

    Raises:
        CheckpointError: for an activation that transformers 4 and 5 read differently.
    """
    legacy = {"gelu": "gelu_pytorch_tanh"}
    name, other = legacy.get(json["hidden_act"], json["hidden_act"]), json["hidden_activation"]
    if other is not None and read_activation(other) != read_activation(name):
        raise CheckpointError(
            f"config.json: hidden_activation is {other!r} and hidden_act {json['hidden_act']!r}; "
            "transformers 4 takes the first and 5 the second. Give both the value that the weights were "
            "trained with."
        )
    return read_gemma(json, "gemma", name)


def read_gemma(json: Json, family: str, activation: str, rope: Rope | None = None) -> DecoderConfig:
    """The DecoderConfig of a config.json that only has the keys of all Gemmas (`READS`).

    For the arguments see jaxft.models.hf_config.read_decoder.
    """
    config = hf_config.read_decoder(json, family, activation, rope)
    return dataclasses.replace(
        as_gemma(config),
        activation=config.activation,
        attention_bias=json["attention_bias"],
        output_bias=json["attention_bias"],
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig of any Gemma, with the keys that all of them have."""
    activation = hf_config.ACTIVATIONS[config.activation]
    return hf_config.write_decoder(config) | {
        "attention_bias": config.attention_bias,
        "hidden_act": activation,
        "hidden_activation": activation,
    }


def read_gguf(header: GgufHeader) -> DecoderConfig:
    """The DecoderConfig of a GGUF file of the first Gemma, whose embeddings llama.cpp always ties."""
    config = as_gemma(gguf.read_gguf_decoder(header, "gemma"))
    return dataclasses.replace(config, tie_embeddings=True)


def as_gemma(config: DecoderConfig) -> DecoderConfig:
    """The config with Gemma's fixed properties: norms by 1 + scale, embeddings times sqrt(D), its GELU."""
    scale = config.hidden_size**0.5
    return dataclasses.replace(
        config, norm_offset=1.0, activation="gelu_tanh", embedding_scale=scale
    )
