"""config.json and tensor names that the encoder families share."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from jaxft.models.encoder import EncoderConfig
from jaxft.models.family import HuggingFace, Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_keys import COMMON, check_multiple
from jaxft.models.names import Entry, layer_norm

READS = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads layer_norm_eps hidden_act".split()
)
# The common keys of transformers' classes of encoders; hidden states do not depend on tied embeddings.
DEFAULTS: dict[str, Any] = COMMON | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
NO_EFFECT = frozenset({"tie_word_embeddings"})
_POOLER = "pooler.dense.weight"


def read_common(json: Json, tensors: Collection[str]) -> dict[str, Any]:
    """Fields of an EncoderConfig; the tensors' names show whether there is a pooler."""
    check_multiple(json, "hidden_size", "num_attention_heads")
    return dict(
        hidden_size=json["hidden_size"],
        intermediate_size=json["intermediate_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=json["num_attention_heads"],
        norm_eps=json["layer_norm_eps"],
        activation=read_activation(json["hidden_act"]),
        pooler=_POOLER in tensors,
    )


def write_common(config: EncoderConfig) -> dict[str, Any]:
    """The keys of config.json that all encoders have."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATIONS[config.activation],
    }


def layer_entries(config: EncoderConfig, attention: str, norms: tuple[str, str]) -> list[Entry]:
    """The tensors of the layers.

    Args:
        config: of the model.
        attention: torch module that holds query, key and value.
        norms: torch modules of the norms of attention and MLP.
    """
    linear = {
        **{f"{attention}.{name}": f"attention/{name}" for name in ("query", "key", "value")},
        "attention.output.dense": "attention/out",
        "intermediate.dense": "mlp/up",
        "output.dense": "mlp/down",
    }
    entries = []
    for i in range(config.num_layers):
        theirs, ours = f"encoder.layer.{i}.", f"layers/{i}/"
        for name, path in linear.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True))
            if config.attention_bias or not name.startswith(attention):
                entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",)))
        for name, path in zip(norms, ("attention_norm", "mlp_norm"), strict=True):
            entries += layer_norm(f"{theirs}{name}", f"{ours}{path}")
    return entries


def pooler_entries(config: EncoderConfig) -> list[Entry]:
    """The tensors of the pooler, if there is one."""
    if not config.pooler:
        return []
    return [
        Entry(_POOLER, ("pooler/kernel",), True),
        Entry("pooler.dense.bias", ("pooler/bias",)),
    ]


def ignores(name: str, config: EncoderConfig) -> bool:
    """Returns whether the tensor is a task's head, which an encoder lacks, or a buffer."""
    heads, buffers = (
        ("cls.", "lm_head.", "classifier.", "qa_outputs."),
        ("position_ids", "token_type_ids"),
    )
    return name.startswith(heads) or name.endswith(buffers)


# The codec of an encoder; a family adds its class, its config.json and its tensors' names.
encoder_codec = functools.partial(HuggingFace, ignores=ignores, task_type="FEATURE_EXTRACTION")
