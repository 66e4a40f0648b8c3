"""Named tensors -> a params tree, leaf by leaf and straight into shards; and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxft.adapters import merge, merge_biases
from jaxft.checkpoints.errors import CheckpointError
from jaxft.models import stack_layers
from jaxft.models.hf_names import Entry
from jaxft.parallel import to_host
from jaxft.weights import is_weight

Params = Any
Read = Callable[[Entry], np.ndarray]  # the tensor of an entry, as the file stores it


def assemble(
    entries: Sequence[Entry],
    read: Read,
    shapes: Params,
    *,
    dtype: Any = None,
    shardings: Params = None,
    stacked: bool = False,
) -> Params:
    """The params tree whose leaves have the `shapes` (of separate layers), read through `entries`.

    Holds one leaf of the file at a time. `shardings`, a tree like the result, places each leaf as it
    comes; `stacked` stacks the layers on a leading axis.
    """
    named = _flatten(shapes)
    by_path = {path: entry for entry in entries for path in entry.paths}
    lost = set(named) ^ set(by_path)
    if lost:
        raise CheckpointError(f"the architecture and the file disagree about {sorted(lost)[0]!r}.")
    fetch = lambda path: _leaf(by_path[path], path, named, read, dtype)
    if not stacked:
        places = _flatten(shardings) if shardings is not None else {}
        return _nest({path: _place(fetch(path), places.get(path)) for path in named})
    return _assemble_stacked(named, fetch, shardings)


def disassemble(entries: Sequence[Entry], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in the file's layout for each entry, one at a time; weights become dense.

    Raises:
        CheckpointError: if the params have what the format lacks: a prompt, a prefix, adapters.
    """
    layers = params["layers"]
    stacked = "0" not in layers
    leaves = _flatten(merge_biases(params))
    known = {path for entry in entries for path in entry.paths}
    known = {re.sub(r"^layers/\d+/", "layers/", path) for path in known} if stacked else known
    for name in sorted(leaves.keys() - known):
        raise CheckpointError(
            f"{name!r} has no place in a model's files; save it as an adapter, beside its base model."
        )

    def fetch(path):
        if not stacked or not path.startswith("layers/"):
            return to_host(merge(leaves[path]))
        _, i, rest = path.split("/", 2)
        return to_host(merge(jax.tree.map(lambda leaf: leaf[int(i)], leaves[f"layers/{rest}"])))

    for entry in entries:
        parts = [fetch(path) for path in entry.paths]
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if entry.file_shape:
            axes = entry.axes or tuple(range(len(entry.file_shape)))
            tensor = tensor.reshape([entry.file_shape[axis] for axis in axes])
            tensor = tensor.transpose(np.argsort(axes))
        yield entry.name, tensor.T if entry.transposed else tensor


def check_names(found: set[str], expected: set[str], where: Any) -> None:
    """Raises CheckpointError naming the first missing or surplus tensor."""
    for problem, names in (("missing", expected - found), ("surplus", found - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{where}: {problem} tensor {sorted(names)[0]!r}{more}; config.json and the weights "
                "describe different models."
            )


def _leaf(entry: Entry, path: str, shapes: Mapping[str, Any], read: Read, dtype) -> np.ndarray:
    tensor = read(entry)
    widths = [shapes[p].shape[-1] for p in entry.paths]
    expected = (*shapes[path].shape[:-1], sum(widths))
    expected = entry.file_shape or (expected[::-1] if entry.transposed else expected)
    if tensor.shape != expected:
        raise CheckpointError(
            f"tensor {entry.name!r} has shape {tensor.shape}, but the config asks for {expected}."
        )
    if entry.permuted_heads:
        tensor = _unpermute(tensor, entry.permuted_heads)
    tensor = tensor.T if entry.transposed else tensor
    if entry.file_shape:
        tensor = tensor.transpose(entry.axes) if entry.axes else tensor
        tensor = tensor.reshape(shapes[path].shape)
    start = sum(widths[: entry.paths.index(path)])
    tensor = tensor[..., start : start + shapes[path].shape[-1]]
    tensor = tensor - np.asarray(entry.offset, tensor.dtype) if entry.offset else tensor
    return tensor if dtype is None else tensor.astype(dtype)


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's rotary order (pairs side by side) -> ours (halves)."""
    rows, columns = tensor.shape
    return (
        tensor.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _assemble_stacked(named, fetch, shardings):
    depth = 1 + max(int(path.split("/")[1]) for path in named if path.startswith("layers/"))
    places = _flatten(shardings) if shardings is not None else {}
    result = {}
    for path in named:
        if not path.startswith("layers/"):
            result[path] = _place(fetch(path), places.get(path))
        elif path.startswith("layers/0/"):
            rest = path.removeprefix("layers/0/")
            parts = [fetch(f"layers/{i}/{rest}") for i in range(depth)]
            name = f"layers/{rest}"
            result[name] = _place(np.stack(parts), places.get(name))
    return _nest(result)


def _place(leaf: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.array(leaf)  # A copy: the memory map must not stay open under the array.
    shard = lambda index: np.ascontiguousarray(leaf[index])
    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _flatten(tree: Params) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _nest(flat: Mapping[str, Any]) -> Params:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def layer_shapes(model: Any) -> Params:
    """Shapes of a model's params with separate layers, found without computing anything."""
    init = lambda key: model.clone(scan_layers=False).init(key, model.example_input())["params"]
    return jax.eval_shape(init, jax.random.key(0))


def stacked_shapes(shapes: Params) -> Params:
    """The same with layers stacked."""
    return jax.eval_shape(stack_layers, shapes)
