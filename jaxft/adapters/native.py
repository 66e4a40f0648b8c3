"""Any adapter as two files: jaxft_adapter.json and jaxft_adapter.safetensors."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey
from safetensors.flax import load_file

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.files import read_adapter, write_adapter
from jaxft.adapters.intrinsic_dimension import CONFIG, WEIGHTS, intrinsic_apply, load_intrinsic
from jaxft.adapters.named import named_rules
from jaxft.adapters.rewrite import Params, adapt, largest_shape, partition, path_name, unsaid
from jaxft.adapters.rules import qpissa, quantised
from jaxft.models.transformer import TRANSFORMER_TARGETS, Targets
from jaxft.parallel import LAYERS, stacked_axes
from jaxft.weights import (
    Frozen,
    Nf4Weight,
    PacaWeight,
    QuantisedWeight,
    ReshapedWeight,
    Weight,
    check_paca,
    is_weight,
)


def apply_named(
    params: Params,
    name: str,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    target: str = "all-linear",
    quantise: str | None = None,
    seed: int = 0,
    targets: Targets = TRANSFORMER_TARGETS,
    layers: str = LAYERS,
    stacked: Callable[[str], int] = stacked_axes,
    input_axes: Callable[[str], int | None] = unsaid,
) -> Params:
    """The params with the adapter `name` (see named_rules), over kernels rounded to `quantise` bits.

    `targets` and `layers` are the family's; `stacked` and `input_axes` are as in `adapt`: the number of
    leading axes that are layers or experts, and of input axes in kernels with more than two axes.

    Raises:
        ValueError: see named_rules; also for quantised kernels that should train whole.
    """
    target, axes = targets.pattern(target), dict(stacked=stacked, input_axes=input_axes)
    if quantise is not None:
        if name in ("full", "monarch"):
            raise ValueError(
                f"--adapter {name} trains the kernels themselves, which --quantise freezes; "
                "choose an adapter such as lora or paca."
            )
        if name == "pissa":  # It splits the dense kernels and rounds the residual.
            rule = qpissa(rank, alpha, kind=quantise)
            return adapt(jax.random.key(seed), params, {target: rule}, **axes)
        rules = {target: quantised(quantise)}
        params = adapt(jax.random.key(seed), params, rules, **axes)
    if name == "full":
        _check_whole(params)
    shape = largest_shape(params, target, **axes) if name in ("vera", "randlora") else None
    options = dict(rank=rank, alpha=alpha, target=target, shape=shape)
    rules = named_rules(name, **options, targets=targets, layers=layers)
    return adapt(jax.random.key(seed), params, rules, **axes)


def _check_whole(params: Params) -> None:
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        node = node.value if isinstance(node, Frozen) else node
        if isinstance(node, Nf4Weight | QuantisedWeight):
            raise ValueError(
                f"--adapter full trains the kernels themselves, and {path_name(path)} is rounded to a few "
                "bits, as in the checkpoint; choose an adapter beside them, such as lora."
            )


def save_native(path: str | os.PathLike, params: Params, *, name: str, **settings: Any) -> None:
    """Writes what an adapter adds to its base model: trainable leaves and random fields.

    Args:
        path: the directory; made if needed.
        params: adapted by `apply_named`.
        name: of the adapter, as in `apply_named`.
        settings: the other arguments of `apply_named`, which `load_native` reuses; without `targets`,
            `layers` and `stacked`, which belong to the model's family and are passed to both, and without
            `input_axes`, which the weights contain. They also contain alpha, and theirs counts.

    Raises:
        AdapterError: if nothing trains, or the weights have several alphas.
    """
    tensors = {name: leaf for name, leaf in _own_leaves(params)}
    if not tensors:
        raise AdapterError("save_native: nothing trains in params; adapt them first.")
    path = pathlib.Path(path)
    axes = {path_name(key): len(node.inputs) for key, node in _nodes(params) if _reshaped(node)}
    config = {"version": 1, "name": name, **settings} | ({"input_axes": axes} if axes else {})
    alphas = {_alpha(node) for node in jax.tree.leaves(params, is_leaf=is_weight)} - {None}
    if len(alphas) > 1:
        raise AdapterError(
            f"save_native: the weights have several alphas ({sorted(alphas)}), which apply_named cannot make "
            "again; use save_adapter."
        )
    config |= {"weight_alpha": alphas.pop()} if alphas else {}
    write_adapter(path / CONFIG, path / WEIGHTS, config, tensors)


def load_native(
    path: str | os.PathLike,
    params: Params,
    *,
    targets: Targets = TRANSFORMER_TARGETS,
    layers: str = LAYERS,
    stacked: Callable[[str], int] = stacked_axes,
) -> Params:
    """The base params with an adapter of `save_native`, or moved by what `save_intrinsic` wrote (dense).

    `targets`, `layers` and `stacked` are those of the model's family, as for `apply_named`. The file contains
    the input axes of kernels with more than two axes.

    Raises:
        AdapterError: if a file is missing or damaged, a key is missing, surplus or misshapen.
    """
    path = pathlib.Path(path)
    settings, tensors = read_adapter(path / CONFIG, path / WEIGHTS, load_file)
    if settings.get("name") == "intrinsic":
        return jax.jit(intrinsic_apply)(load_intrinsic(path, params))
    if settings.pop("version", None) != 1:
        raise AdapterError(f"{path}: written by another version of jaxft; update it.")
    place = dict(targets=targets, layers=layers, stacked=stacked)
    inputs, alpha = settings.pop("input_axes", {}).get, settings.pop("weight_alpha", None)
    adapted = apply_named(params, **settings, **place, input_axes=inputs)
    head = {n.removeprefix("reward/"): t for n, t in tensors.items() if n.startswith("reward/")}
    if head:  # Not a part of the adapter.
        adapted["reward"] = head
    expected = dict(_own_leaves(adapted))
    for name in sorted(expected.keys() ^ tensors.keys()):
        kind = "missing" if name in expected else "surplus"
        raise AdapterError(f"{path}: {kind} key {name!r}; the adapter is for another model.")
    for name, leaf in expected.items():
        if leaf.shape != tensors[name].shape:
            raise AdapterError(
                f"{path}: {name!r} has shape {tensors[name].shape}, the model needs {leaf.shape}."
            )
    loaded = _own_leaves(adapted, tensors)
    for key, node in _nodes(loaded):
        node = node.matrix if _reshaped(node) else node
        if isinstance(node, PacaWeight):
            check_paca(node, f"{path}: {path_name(key)}")
    if alpha is None:  # No weight has one, or the file is of an older version.
        return loaded
    return jax.tree.map(lambda node: _with_alpha(node, alpha), loaded, is_leaf=is_weight)


def _nodes(params):
    """(path, weight or array); for a frozen weight, its content."""
    for key, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        yield key, node.value if isinstance(node, Frozen) else node


def _reshaped(node):
    return isinstance(node, ReshapedWeight)


def _alpha(node):
    """The alpha of an adapter's weight, None for other nodes and frozen ones."""
    return getattr(node.matrix if _reshaped(node) else node, "alpha", None)


def _with_alpha(node, alpha):
    if _alpha(node) is None:
        return node
    if _reshaped(node):
        return dataclasses.replace(node, matrix=_with_alpha(node.matrix, alpha))
    return dataclasses.replace(node, alpha=alpha)


def _own_leaves(params: Params, values: dict | None = None):
    """(name, leaf) of all leaves that are not the base model's; or the params with `values` there."""
    found = []

    def visit(prefix, node):
        name = path_name(prefix)
        if not isinstance(node, Weight):
            found.append((name, node))
            return node if values is None else values[name]
        if not jax.tree.leaves(partition(node)[0]):
            return node
        if isinstance(node, ReshapedWeight):
            return dataclasses.replace(
                node, matrix=visit((*prefix, GetAttrKey("matrix")), node.matrix)
            )
        changed = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if field.name == "base" or field.metadata.get("static") or value is None:
                continue
            found.append((f"{name}/{field.name}", value))
            if values is not None:
                changed[field.name] = values[f"{name}/{field.name}"]
        return dataclasses.replace(node, **changed)

    rebuilt = jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_weight)
    return found if values is None else rebuilt
