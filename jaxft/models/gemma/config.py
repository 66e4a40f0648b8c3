"""config.json of the Gemma families, and what all of them compute alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import gguf, hf_config
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.family import GgufHeader, Json

READS = hf_config.READS | {"hidden_activation", "attn_logit_softcapping", "final_logit_softcapping"}


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of the first Gemma's config.json."""
    return read_gemma(json, "gemma")


def read_gemma(json: Json, family: str, rope: Rope | None = None) -> DecoderConfig:
    """The DecoderConfig of a config.json that has nothing but what Gemma's has (the keys `READS`).

    For `rope` see jaxft.models.hf_config.read_decoder.
    """
    return dataclasses.replace(
        as_gemma(hf_config.read_decoder(json, family, rope)),
        head_dim=json.get("head_dim") or 256,
        activation=hf_config.read_activation(json.get("hidden_activation") or "gelu_pytorch_tanh"),
        attention_softcap=json.get("attn_logit_softcapping"),
        final_softcap=json.get("final_logit_softcapping"),
        tie_embeddings=json.get("tie_word_embeddings", True),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig of any Gemma, windows aside."""
    return hf_config.write_decoder(config) | {
        "hidden_activation": hf_config.ACTIVATIONS[config.activation],
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "query_pre_attn_scalar": round(config.scale**-2),
    }


def read_gguf(header: GgufHeader) -> DecoderConfig:
    """The DecoderConfig of a GGUF file of the first Gemma."""
    return as_gemma(gguf.read_gguf_decoder(header, "gemma"))


def as_gemma(config: DecoderConfig) -> DecoderConfig:
    """The config with what no file says: norms by 1 + scale, embeddings scaled by sqrt(D), its GELU."""
    scale = config.hidden_size**0.5
    return dataclasses.replace(
        config, norm_offset=1.0, activation="gelu_tanh", embedding_scale=scale
    )
