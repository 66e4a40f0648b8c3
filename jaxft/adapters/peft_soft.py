"""Prompts and prefixes in the format of Hugging Face PEFT: PROMPT_TUNING and PREFIX_TUNING.

Checked against PEFT 0.21 with transformers 5. Both hold one tensor, "prompt_embeddings": a prompt's is
[l, D], before embeddings that are already scaled (Gemma's are, by sqrt(D)); a prefix's is
[l, layers x 2 x KV heads x head size], keys before values, put into the cache as it is: not rotated,
and token 0 behind it stands at position l. There is one difference: under a sliding window PEFT's
prefixes slide out of sight, ours stay.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.rewrite import Params, adapt, partition, path_name
from jaxft.models.config import DecoderConfig
from jaxft.weights import to_dense

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
TYPES = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}


def save_soft(
    path: str | os.PathLike, config: DecoderConfig, params: Params, *, base_model: str = ""
) -> None:
    """Writes the prompt or the prefix of adapted params so that PEFT opens it; an MLP is folded away.

    Args:
        path: the directory; made if needed.
        config: of the model.
        params: adapted; nothing but a prompt, or but a prefix, may train.
        base_model: written as base_model_name_or_path.

    Raises:
        AdapterError: if something else trains (PEFT's format would lose it), or nothing does.
    """
    trained = jax.tree_util.tree_leaves_with_path(partition(params)[0])
    names = {path_name(leaf_path).split("/")[0] for leaf_path, _ in trained}
    if len(names) != 1 or names - set(TYPES.values()):
        raise AdapterError(
            f"save_soft: {', '.join(sorted(names)) or 'nothing'} trains; PEFT's format holds one prompt "
            "or one prefix; use save_native."
        )
    name = names.pop()
    tensor = np.asarray(to_dense(params[name]), np.float32)
    if name == "prompt":
        tensor = tensor * np.float32(config.embedding_scale)
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file({TENSOR: np.ascontiguousarray(tensor)}, path / WEIGHTS, metadata={"format": "pt"})
    settings = _settings(name, config, len(tensor)) | {"base_model_name_or_path": base_model}
    (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def load_soft(path: str | os.PathLike, config: DecoderConfig, params: Params) -> Params:
    """The params, of either layout, with the prompt or prefix of a PEFT adapter; all else is frozen.

    Raises:
        AdapterError: if a file is missing or damaged, a key is missing, surplus or misshapen, or the
            adapter is of another type or model.
    """
    path = pathlib.Path(path)
    settings, tensors = _read(path)
    name = TYPES.get(settings.get("peft_type"))
    if name is None:
        raise AdapterError(
            f"{path}: peft_type {settings.get('peft_type')!r}; expected {' or '.join(TYPES)}."
        )
    if tensors.keys() != {TENSOR}:
        missing = TENSOR not in tensors
        key = TENSOR if missing else sorted(tensors.keys() - {TENSOR})[0]
        raise AdapterError(f"{path}: {'missing' if missing else 'surplus'} key {key!r}.")
    length = settings.get("num_virtual_tokens")
    expected = (length, _width(name, config))
    if tensors[TENSOR].shape != expected:
        raise AdapterError(
            f"{path}: {TENSOR!r} has shape {tensors[TENSOR].shape}, the config and the model need "
            f"{expected}; the adapter is for another model."
        )
    tensor = jnp.asarray(tensors[TENSOR], jnp.float32)
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


def _read(path: pathlib.Path):
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise AdapterError(f"{path}: no {name}; is it a PEFT adapter, copied whole?")
    try:
        return json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path}: damaged ({error}); copy it again.") from None
