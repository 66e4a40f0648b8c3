"""Hugging Face's config.json of encoders <-> EncoderConfig."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.checkpoints.families import ACTIVATIONS, Json, activation
from jaxft.models.encoder import EncoderConfig

ENCODERS = {"bert": "BertModel", "roberta": "RobertaModel", "vit": "ViTModel"}


def encoder_config(json: Json, names: Collection[str]) -> EncoderConfig:
    """The EncoderConfig of a config.json; `names` of the tensors tell whether there is a pooler."""
    family = json["model_type"]
    common = dict(
        hidden_size=json.get("hidden_size", 768),
        intermediate_size=json.get("intermediate_size", 3072),
        num_layers=json.get("num_hidden_layers", 12),
        num_heads=json.get("num_attention_heads", 12),
        norm_eps=json.get("layer_norm_eps", 1e-12),
        activation=activation(json.get("hidden_act", "gelu")),
        pooler="pooler.dense.weight" in names,
        family=family,
    )
    if family == "vit":
        size, patch = json.get("image_size", 224), json.get("patch_size", 16)
        return EncoderConfig(
            **common,
            num_positions=(size // patch) ** 2 + 1,
            pre_norm=True,
            attention_bias=json.get("qkv_bias", True),
            image_size=size,
            patch_size=patch,
            channels=json.get("num_channels", 3),
        )
    return EncoderConfig(
        **common,
        vocab_size=json.get("vocab_size", 30522),
        num_positions=json.get("max_position_embeddings", 512),
        position_offset=json.get("pad_token_id", 1) + 1 if family == "roberta" else 0,
        token_types=json.get("type_vocab_size", 2),
    )


def hf_encoder_config(config: EncoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of an EncoderConfig; the inverse of `encoder_config`."""
    json = {
        "architectures": [ENCODERS[config.family]],
        "model_type": config.family,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATIONS[config.activation],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.family == "vit":
        return json | {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": config.channels,
            "qkv_bias": config.attention_bias,
        }
    return json | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.num_positions,
        "type_vocab_size": config.token_types,
        "pad_token_id": config.position_offset - 1 if config.family == "roberta" else 0,
    }
