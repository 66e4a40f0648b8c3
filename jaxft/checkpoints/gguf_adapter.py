"""Reads and writes LoRA adapters as GGUF files, which llama.cpp applies with --lora."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import AdapterError
from jaxft.adapters.peft import adapter_tensors
from jaxft.adapters.peft.model import PREFIX, pattern
from jaxft.checkpoints.assemble import permuted, unpermuted
from jaxft.checkpoints.gguf import GgufTensor, check_type, open_file, package
from jaxft.checkpoints.gguf_write import add_fields, begin, replacing
from jaxft.models import (
    FAMILIES,
    Entry,
    Family,
    family_of,
    is_stacked,
    stack_layers,
    unstack_layers,
)
from jaxft.parallel import path_name, written_once
from jaxft.weights import Frozen, LoraWeight, is_weight

Params = Any


def save_gguf_adapter(
    path: str | os.PathLike,
    config: Any,
    params: Params,
    *,
    base: Params | None = None,
    name: str = "",
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes the LoRA of adapted params as llama.cpp's converter does: tensors `<name>.lora_a` and `.lora_b`.

    A is [R, in]; the rows of B [out, R] are in the order of the tensor's rows in a GGUF file. The file has
    one alpha; for a kernel with another alpha, B is rescaled. GPT-2's query, key and value become one LoRA of
    the summed rank.

    Args:
        path: the file.
        config: of the model.
        params: adapted, of either layout.
        base: see jaxft.adapters.save_adapter.
        name: general.name, for human readers.
        families: see load_model.

    Raises:
        AdapterError: for anything other than LoRA on the matrices of a family that has GGUF files.
    """
    gguf, path = package(), pathlib.Path(path)
    family = family_of(config, families)
    settings, theirs = adapter_tensors(config, params, base, families=families)
    tensors = _tensors(family, config, settings, theirs)
    metadata = {
        "general.type": "adapter",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        **({"general.name": name} if name else {}),
        "adapter.type": "lora",
        "adapter.lora.alpha": _alpha(settings),
    }

    def write():
        with replacing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, family.gguf.architecture)
            with contextlib.closing(writer):
                add_fields(writer, metadata)
                for tensor, values in tensors.items():
                    writer.add_tensor_info(tensor, values.shape, values.dtype, values.nbytes)
                begin(writer)
                for values in tensors.values():
                    writer.write_tensor_data(values)

    written_once(write, str(path))


def load_gguf_adapter(
    path: str | os.PathLike,
    config: Any,
    params: Params,
    *,
    families: Sequence[Family] = FAMILIES,
) -> Params:
    """The params with the LoRA of a GGUF file; all other leaves are frozen.

    Raises:
        AdapterError: if the file is not a LoRA of this model.
        CheckpointError: if it is damaged.
    """
    path, family = pathlib.Path(path), family_of(config, families)
    alpha, tensors = _open(path, _codec(family).architecture)
    read = lambda name: GgufTensor(tensors.pop(name))[...]
    stacked = is_stacked(params, family.layers)
    flat = unstack_layers(params, family.layers)
    pairs, tree = jax.tree_util.tree_flatten_with_path(flat, is_leaf=is_weight)
    nodes = {path_name(p): n.value if isinstance(n, Frozen) else n for p, n in pairs}
    found = {}
    for entry in family.gguf.entries(config):
        names = [f"{entry.name}.lora_{which}" for which in "ab"]
        if entry.transposed and all(name in tensors for name in names):
            found |= _weights(path, entry, nodes, read(names[0]).T, read(names[1]), alpha)
    if tensors or not found:
        raise AdapterError(
            f"{path}: {min(tensors, default='no tensor')!r} belongs to no matrix of this model; the adapter "
            "is of another one."
        )
    leaves = [found.get(name, Frozen(node)) for name, node in nodes.items()]
    adapted = jax.tree.unflatten(tree, leaves)
    return stack_layers(adapted, family.layers) if stacked else adapted


def _open(path, architecture):
    """(alpha, name -> tensor) of the LoRA file of an architecture."""
    reader = open_file(path)
    get = lambda key: reader.fields[key].contents() if key in reader.fields else None
    wanted = {
        "general.type": (None, "adapter"),
        "adapter.type": ("lora",),
        "general.architecture": (architecture,),
        "adapter.alora.invocation_tokens": (None,),
    }
    for key, values in wanted.items():
        if get(key) not in values:
            raise AdapterError(f"{path}: {key} is {get(key)!r}, expected {values[-1]!r}.")
    for tensor in reader.tensors:
        check_type(path, tensor.name, tensor)
    return get("adapter.lora.alpha"), {tensor.name: tensor for tensor in reader.tensors}


def _weights(path, entry: Entry, kernels: Mapping[str, Any], a, b, alpha) -> dict[str, LoraWeight]:
    """path -> weight of the leaves in one tensor; a [in, R], b [out, R]."""
    if entry.permuted_heads:
        b = b[unpermuted(len(b), entry.permuted_heads)]
    widths = [kernels[p].shape[-1] for p in entry.paths]
    inputs = kernels[entry.paths[0]].shape[0]
    if a.shape[0] != inputs or len(b) != sum(widths) or a.shape[1] != b.shape[1]:
        raise AdapterError(
            f"{path}: {entry.name}.lora_a {a.shape[::-1]} and .lora_b {b.shape} do not fit a matrix of "
            f"{inputs} inputs and {sum(widths)} outputs; the adapter is of another model."
        )
    ends = np.cumsum([0, *widths])
    alpha = float(alpha or a.shape[1])  # as in llama.cpp: no alpha, or 0, means a scale of 1
    return {
        p: LoraWeight(kernels[p], jnp.asarray(a), jnp.asarray(b[ends[i] : ends[i + 1]].T), alpha)
        for i, p in enumerate(entry.paths)
    }


def _alpha(settings) -> float:
    # llama.cpp reads 0 as no alpha; a B of zeros has the same effect.
    return float(settings["lora_alpha"]) or 1.0


def _codec(family):
    if family.gguf is None:
        raise AdapterError(f"{family.name}: jaxft has no GGUF format for this family.")
    return family.gguf


def _tensors(family, config, settings, theirs) -> dict[str, np.ndarray]:
    """name -> tensor of the file, from PEFT's."""
    kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
    if kind != "LORA":
        raise AdapterError(
            f"llama.cpp supports only LoRA, the params have {kind}; merge it and write the whole model."
        )
    modules = {e.paths: e.name.rsplit(".", 1)[0] for e in family.huggingface.entries(config)}
    result, left = {}, dict(theirs)
    for entry in _codec(family).entries(config):
        module = modules[entry.paths]
        keys = [f"{PREFIX}{module}.lora_{which}.weight" for which in "AB"]
        if keys[0] not in left:
            continue
        a, b = (np.ascontiguousarray(left.pop(key), np.float32) for key in keys)
        alpha = pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        b = b * np.float32(alpha / _alpha(settings))
        if entry.permuted_heads:
            b = b[permuted(len(b), entry.permuted_heads)]
        result |= {f"{entry.name}.lora_a": a, f"{entry.name}.lora_b": np.ascontiguousarray(b)}
    if left:
        raise AdapterError(
            f"{min(left).removeprefix(PREFIX)!r} trains too, which llama.cpp's LoRA files cannot hold; "
            "merge it (merge.py) and write the whole model."
        )
    return result
