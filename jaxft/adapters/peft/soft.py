"""PROMPT_TUNING and PREFIX_TUNING: virtual tokens in front of each row.

Checked against PEFT 0.21 with transformers 5. Both hold one tensor, "prompt_embeddings". A prompt's is
[l, D], prepended to embeddings that are already scaled (Gemma's are, by sqrt(D)); a prefix's is
[l, layers x 2 x KV heads x head size], keys before values, written into the cache without rotation,
and token 0 after it has position l. There is one difference: under a sliding window, PEFT's prefixes
leave the window, jaxft's remain visible.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import numpy
from jaxft.adapters.rewrite import Params, adapt, partition, path_name
from jaxft.models.config import DecoderConfig
from jaxft.models.soft import check_virtual
from jaxft.weights import to_dense

TENSOR = "prompt_embeddings"
TYPES = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}


def soft_name(params: Params) -> str | None:
    """Which of "prompt" and "prefix" trains in the params, or None.

    Raises:
        AdapterError: if any other leaf trains.
    """
    trained = jax.tree_util.tree_leaves_with_path(partition(params)[0])
    names = {path_name(path).split("/")[0] for path, _ in trained}
    soft = names & set(TYPES.values())
    if soft and len(names) > 1:
        raise AdapterError(
            f"save_adapter: {', '.join(sorted(names))} trains; PEFT's format holds one prompt or one "
            "prefix and nothing beside it; use save_native."
        )
    return soft.pop() if soft else None


def write_soft(config: DecoderConfig, params: Params, name: str) -> tuple[Settings, Tensors]:
    """(settings, tensors) of the prompt or prefix; an MLP is folded in."""
    tensor = numpy(to_dense(params[name]))
    if name == "prompt":
        tensor = tensor * np.float32(config.embedding_scale)
    return _settings(name, config, len(tensor)), {TENSOR: tensor}


def read_soft(
    settings: Settings, tensors: Tensors, config: DecoderConfig, params: Params
) -> Params:
    """The params, of either layout, with the prompt or prefix; all other leaves are frozen.

    Raises:
        AdapterError: if the tensor is missing or misshapen, or the model takes no such tokens.
    """
    name = TYPES[settings["peft_type"]]
    try:
        check_virtual(config, {name})
    except ValueError as error:
        raise AdapterError(str(error)) from None
    shape = (settings["num_virtual_tokens"], _width(name, config))
    tensor = jnp.asarray(take(tensors, TENSOR, shape))
    if name == "prompt":
        tensor = tensor / config.embedding_scale
    return {**adapt(jax.random.key(0), params, {}), name: tensor}


def _width(name, config: DecoderConfig) -> int:
    if name == "prompt":
        return config.hidden_size
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim


def _settings(name, config: DecoderConfig, length: int) -> dict[str, Any]:
    common = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "num_layers": config.num_layers,
    }
    if name == "prompt":
        return common | {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "num_attention_heads": config.num_heads,
            "token_dim": config.hidden_size,
        }
    width = config.num_kv_heads * config.head_dim
    return common | {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "num_attention_heads": config.num_kv_heads,
        "token_dim": width,
        "encoder_hidden_size": width,
    }
