"""Adapters in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxft.adapters import native
from jaxft.adapters.errors import AdapterError
from jaxft.adapters.rewrite import Params, partition, path_name
from jaxft.models import stack_layers, unstack_layers
from jaxft.models.config import DecoderConfig
from jaxft.models.hf_names import Entry, huggingface_entries
from jaxft.models.layout import is_stacked
from jaxft.weights import Frozen, LoraWeight, is_weight

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    path: str | os.PathLike, config: DecoderConfig, params: Params, *, base_model: str = ""
) -> None:
    """Writes the LoRA weights of adapted params so that PEFT opens them.

    GPT-2 keeps query, key and value in one matrix: their adapters are written as one of the summed
    rank, with a block-diagonal B.

    Args:
        path: the directory; made if needed.
        config: of the model.
        params: adapted; nothing but LoRA weights may train.
        base_model: written as base_model_name_or_path.

    Raises:
        AdapterError: if something else trains: that would be lost; use save_model.
    """
    loras = _lora_weights(params)
    tensors, ranks, alphas = {}, {}, {}
    for entry in _kernels(config):
        parts = [loras.get(path) for path in entry.paths]
        if any(part is not None for part in parts):
            module = entry.name.removesuffix(".weight")
            a, b, alpha = _join(parts, config)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
            ranks[module], alphas[module] = a.shape[1], alpha
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    json_config = _config_json(config, ranks, alphas, base_model)
    (path / CONFIG).write_text(json.dumps(json_config, indent=2) + "\n")


def load_adapter(path: str | os.PathLike, config: DecoderConfig, params: Params) -> Params:
    """The params with the LoRA weights of a PEFT adapter on their kernels; all else is frozen.

    A directory of `save_native` is read too.

    Raises:
        AdapterError: if a key is missing, surplus or misshapen, or the adapter is no plain LoRA.
    """
    path = pathlib.Path(path)
    if (path / native.CONFIG).exists():
        return native.load_native(path, params)
    settings, tensors = _read(path)
    stacked = is_stacked(params["layers"])
    flat = unstack_layers(params) if stacked else params
    loras: dict[str, tuple] = {}
    for entry in _kernels(config):
        module = entry.name.removesuffix(".weight")
        names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
        present = [name in tensors for name in names]
        if any(present) and not all(present):
            raise AdapterError(f"{path}: missing key {names[present.index(False)]!r}.")
        if all(present):
            a, b = (tensors.pop(name).T for name in names)
            loras |= _split(entry, a, b, _alpha(settings, module, a.shape[1]), flat)
    if tensors:
        raise AdapterError(
            f"{path}: surplus key {sorted(tensors)[0]!r}; the adapter is for another model."
        )
    if not loras:
        raise AdapterError(f"{path}: the file holds no LoRA weights.")
    _check_targets(path, settings, config, loras)
    adapted = jax.tree_util.tree_map_with_path(
        lambda p, node: _attach(path_name(p), node, loras), flat, is_leaf=is_weight
    )
    return stack_layers(adapted) if stacked else adapted


def _attach(name, node, loras):
    base = node.value if isinstance(node, Frozen) else node
    if name not in loras:
        return Frozen(base)
    a, b, alpha = loras[name]
    if (a.shape[0], b.shape[1]) != base.shape:
        raise AdapterError(
            f"adapter of {name!r} is for a kernel {(a.shape[0], b.shape[1])}, but the model's is "
            f"{base.shape}."
        )
    return LoraWeight(base, jnp.asarray(a), jnp.asarray(b), alpha)


def _lora_weights(params: Params) -> Mapping[str, LoraWeight]:
    flat = unstack_layers(params)
    nodes = jax.tree_util.tree_flatten_with_path(flat, is_leaf=is_weight)[0]
    loras = {path_name(path): node for path, node in nodes if isinstance(node, LoraWeight)}
    for path, node in nodes:
        name = path_name(path)
        if name not in loras and jax.tree.leaves(partition(node)[0]):
            raise AdapterError(
                f"save_adapter: {name!r} trains but is no LoRA weight; PEFT's LoRA format has no "
                "place for it. Save the whole model with save_model."
            )
    if not loras:
        raise AdapterError("save_adapter: no LoRA weight in params; adapt them first.")
    return loras


def _kernels(config: DecoderConfig) -> list[Entry]:
    return [e for e in huggingface_entries(config) if e.paths[0].endswith("/kernel")]


def _join(parts, config):
    """One (A [in, R], B [R, out], alpha) from the adapters side by side in one file tensor."""
    known = [part for part in parts if part is not None]
    scale = known[0].alpha / known[0].rank
    if any(part.alpha / part.rank != scale for part in known):
        raise AdapterError("save_adapter: query, key and value of GPT-2 need one alpha / rank.")
    numpy = lambda leaf: np.asarray(leaf, np.float32)
    rank = sum(part.rank for part in known)
    width = lambda part: config.hidden_size if part is None else part.b.shape[1]
    b = np.zeros((rank, sum(map(width, parts))), np.float32)
    row = column = 0
    for part in parts:
        if part is not None:
            b[row : row + part.rank, column : column + width(part)] = numpy(part.b)
            row += part.rank
        column += width(part)
    a = np.concatenate([numpy(part.a) for part in known], axis=1)
    return a, b, scale * rank


def _split(entry, a, b, alpha, params):
    leaves = {}
    for path in entry.paths:
        node = params
        for part in path.split("/"):
            node = node[part]
        leaves[path] = node.shape[-1]
    if b.shape[1] != sum(leaves.values()):
        raise AdapterError(
            f"lora_B of {entry.name!r} has {b.shape[1]} outputs, the model {sum(leaves.values())}."
        )
    cuts = np.cumsum([0, *leaves.values()])
    pieces = zip(entry.paths, cuts, cuts[1:], strict=False)
    return {path: (a, b[:, start:end], alpha) for path, start, end in pieces}


def _config_json(config, ranks, alphas, base_model) -> dict[str, Any]:
    common_rank = max(set(ranks.values()), key=list(ranks.values()).count)
    common_alpha = next(alphas[m] for m in ranks if ranks[m] == common_rank)
    plain = lambda x: int(x) if float(x).is_integer() else x
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": common_rank,
        "lora_alpha": plain(common_alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _targets(config, ranks),
        "rank_pattern": {m: r for m, r in ranks.items() if r != common_rank},
        "alpha_pattern": {m: plain(a) for m, a in alphas.items() if a != common_alpha},
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(config, ranks) -> list[str]:
    """Short names ("q_proj") where every layer's is adapted, full ones otherwise."""
    modules = [entry.name.removesuffix(".weight") for entry in _kernels(config)]
    short = lambda module: module.rsplit(".", 1)[-1]
    whole = {short(m) for m in modules}
    # "c_proj" names two matrices of a GPT-2 block, of which one alone may be adapted.
    partial = {short(m) for m in modules if m not in ranks}
    named = [short(m) if short(m) in whole - partial else m for m in ranks]
    return sorted(set(named))


def _read(path: pathlib.Path):
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            hint = (
                "adapter_model.bin is pickled; convert it"
                if name == WEIGHTS
                else "is it a PEFT adapter?"
            )
            raise AdapterError(f"{path}: no {name}; {hint}.")
    settings = json.loads((path / CONFIG).read_text())
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {settings.get('peft_type')!r}; supported: LORA.")
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"):
        if settings.get(option):
            raise AdapterError(f"{path}: {option}={settings[option]!r} is not supported.")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias={settings['bias']!r} is not supported; expected 'none'.")
    try:
        return settings, load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise AdapterError(f"{path / WEIGHTS}: damaged ({error}); copy it again.") from None


def _alpha(settings, module: str, rank: int) -> float:
    """alpha in alpha / rank: PEFT's patterns match the module's name or its end."""
    match = lambda table, default: next(
        (v for k, v in table.items() if module == k or module.endswith("." + k)), default
    )
    expected = match(settings.get("rank_pattern") or {}, settings["r"])
    if expected != rank:
        raise AdapterError(f"lora_A of {module!r} has rank {rank}, the config says {expected}.")
    alpha = float(match(settings.get("alpha_pattern") or {}, settings["lora_alpha"]))
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _check_targets(path, settings, config, loras):
    """Every module that the config names must be in the file, or part of the adapter was lost."""
    targets = settings.get("target_modules") or []
    if isinstance(targets, str):
        return  # "all-linear" or a regular expression: nothing to count against.
    only = settings.get("layers_to_transform")
    for entry in _kernels(config):
        module = entry.name.removesuffix(".weight")
        named = any(module == t or module.endswith("." + t) for t in targets)
        layer = next((int(p) for p in module.split(".") if p.isdigit()), None)
        chosen = only is None or layer in ([only] if isinstance(only, int) else only)
        if named and chosen and entry.paths[0] not in loras:
            raise AdapterError(f"{path}: missing key '{PREFIX}{module}.lora_A.weight'.")
