"""Named tensors -> a params tree, leaf by leaf and straight into shards; and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxft.adapters import merge, merge_biases
from jaxft.models import CheckpointError, Entry, is_stacked, stack_layers
from jaxft.parallel import LAYERS, path_name, to_host
from jaxft.weights import Weight, WeightLike, is_weight

Params = Any
Index = tuple[slice, ...]  # with explicit starts and stops


class Tensor(Protocol):
    """A tensor as stored in a file; indexing reads that part: a memory-mapped array, a GGUF tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part at the index: for each axis a slice or, on the first, an array of rows."""


Read = Callable[[Entry], Tensor]


def assemble(
    entries: Sequence[Entry],
    read: Read,
    shapes: Params,
    *,
    dtype: Any = None,
    shardings: Params = None,
    stacked: bool = False,
    layers: str = LAYERS,
) -> Params:
    """The params tree whose leaves have the `shapes` (of separate layers), read through `entries`.

    If `shapes` has a structured weight, the tensor makes it: `tensor.weight(dtype)`. Only the parts that
    this host's devices hold are read, one shard of one leaf at a time (a structured weight is read whole).
    `shardings`, a tree like the result, places each leaf; `stacked` stacks the layers, whose path is
    `layers`, on a leading axis.
    """
    named = flatten(shapes)
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        for path in entry.paths:
            by_path.setdefault(path, []).append(entry)
    lost = set(named) ^ set(by_path)
    if lost:
        raise CheckpointError(f"the architecture and the file disagree about {sorted(lost)[0]!r}.")

    def fetch(path):
        parts = by_path[path]
        if parts[0].expert is None:
            return _leaf(parts[0], path, named, read, dtype)
        return _experts(parts, path, named, read, dtype)

    leaves = _stacks(named, fetch, layers) if stacked else {path: fetch(path) for path in named}
    places = flatten(shardings) if shardings is not None else {}
    return _nest({path: _place(leaf, places.get(path)) for path, leaf in leaves.items()})


def disassemble(
    entries: Sequence[Entry], params: Params, layers: str = LAYERS
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in the file's layout for each entry, one at a time; weights become dense.

    `layers` is the path of the layers in the params, stacked or separate.

    Raises:
        CheckpointError: if the params have leaves that the format lacks: a prompt, a prefix, adapters.
    """
    stacked = is_stacked(params, layers)
    leaves = flatten(merge_biases(params))
    number = re.compile(rf"^{re.escape(layers)}/(\d+)/")
    known = {path for entry in entries for path in entry.paths}
    known = {number.sub(f"{layers}/", path) for path in known} if stacked else known
    for name in sorted(leaves.keys() - known):
        raise CheckpointError(
            f"{name!r} cannot be saved in a model's files; save it as an adapter of its base model."
        )

    def fetch(path, entry):
        layer = number.match(path) if stacked else None
        index = () if layer is None else (int(layer[1]),)
        index += () if entry.expert is None else (entry.expert,)
        node = leaves[path if layer is None else number.sub(f"{layers}/", path)]
        dense = to_host(merge(jax.tree.map(lambda leaf: leaf[index], node) if index else node))
        return dense[:, slice(*entry.columns)] if entry.columns else dense

    for entry in entries:
        parts = [fetch(path, entry) for path in entry.paths]
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if entry.file_shape:
            axes = entry.axes or tuple(range(len(entry.file_shape)))
            tensor = tensor.reshape([entry.file_shape[axis] for axis in axes])
            tensor = tensor.transpose(np.argsort(axes))
        tensor = tensor.T if entry.transposed else tensor
        if entry.offset:
            tensor = tensor.astype(np.float32) + np.float32(entry.offset)
        if entry.permuted_heads:
            tensor = tensor[permuted(len(tensor), entry.permuted_heads)]
        yield entry.name, tensor


def check_names(found: set[str], expected: set[str], where: Any) -> None:
    """Raises CheckpointError naming the first missing or surplus tensor."""
    for problem, names in (("missing", expected - found), ("surplus", found - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{where}: {problem} tensor {sorted(names)[0]!r}{more}; config.json and the weights "
                "describe different models."
            )


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf in a file: `leaf[index]`, with a slice for each axis, copies only that part.

    The part has the requested data type; the rest of the tensor is not read, converted or transposed.
    """

    tensor: Tensor
    entry: Entry
    shape: tuple[int, ...]
    start: int  # its first column among those of the leaves in this tensor
    dtype: np.dtype
    structured: bool  # whether the params hold it as the tensor's weight

    def weight(self) -> Weight:
        """The structured weight, with arrays on the host."""
        return self.tensor.weight(self.dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        entry = self.entry
        part = self._reshaped(index) if entry.file_shape else self._part(index)
        part = part - np.asarray(entry.offset, part.dtype) if entry.offset else part
        # A copy: the array must not keep the memory map open.
        return np.array(part, self.dtype, order="C")

    def _part(self, index):
        *outer, last = index
        index = (*outer, slice(last.start + self.start, last.stop + self.start))
        if (
            heads := self.entry.permuted_heads
        ):  # the outputs: the last axis here, the first in the file
            rows = unpermuted(self.tensor.shape[0], heads)[index[-1]]
            if not self.entry.transposed:  # a bias
                return self.tensor[...][rows]
            return self.tensor[(rows, index[0])].T
        return self.tensor[index[::-1]].T if self.entry.transposed else self.tensor[index]

    def _reshaped(self, index):
        axes = self.entry.axes
        if axes and tuple(self.entry.file_shape[axis] for axis in axes) == self.shape:
            theirs = tuple(index[axes.index(axis)] for axis in range(len(axes)))
            return self.tensor[theirs].transpose(axes)
        # Leaves whose axes are split or joined in the file (patches, their positions) are small.
        whole = self.tensor[...]
        whole = whole.transpose(axes) if axes else whole
        return whole.reshape(self.shape)[index]


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The matrix of an expert whose columns are in several tensors; sliced like a `_Leaf`."""

    parts: Sequence[_Leaf]
    structured = False

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(part.dtype for part in self.parts))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    def __getitem__(self, index: Index) -> np.ndarray:
        rows, columns = index
        found, start = [], 0
        for part in self.parts:
            width = part.shape[1]
            here = slice(*(min(max(at - start, 0), width) for at in (columns.start, columns.stop)))
            found.append(part[rows, here])
            start += width
        return np.concatenate(found, axis=1)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Leaves of the same shape, one for each layer or expert, on a leading axis; sliced like a `_Leaf`."""

    layers: Sequence[_Leaf | _Columns | _Stack]

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(layer.dtype for layer in self.layers))

    @property
    def structured(self) -> bool:
        return self.layers[0].structured

    def weight(self) -> Weight:
        """The layers' weights, stacked."""
        return jax.tree.map(
            lambda *parts: np.stack(parts), *(leaf.weight() for leaf in self.layers)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    def __getitem__(self, index: Index) -> np.ndarray:
        layers, *rest = index
        chosen = self.layers[layers]
        shape = [len(chosen), *(part.stop - part.start for part in rest)]
        stack = np.empty(shape, self.dtype)
        for i, layer in enumerate(chosen):
            stack[i] = layer[tuple(rest)]
        return stack


def _leaf(entry: Entry, path: str, shapes: Mapping[str, Any], read: Read, dtype) -> _Leaf:
    tensor = read(entry)
    widths = [shapes[p].shape[-1] for p in entry.paths]
    expected = (*shapes[path].shape[:-1], sum(widths))
    expected = entry.file_shape or (expected[::-1] if entry.transposed else expected)
    if tensor.shape != expected:
        raise CheckpointError(
            f"tensor {entry.name!r} has shape {tensor.shape}, but the config asks for {expected}."
        )
    start = sum(widths[: entry.paths.index(path)])
    kind = np.dtype(tensor.dtype if dtype is None or entry.as_stored else dtype)
    return _Leaf(tensor, entry, shapes[path].shape, start, kind, is_weight(shapes[path]))


def _experts(entries: Sequence[Entry], path: str, shapes: Mapping[str, Any], read, dtype) -> _Stack:
    """The leaf [E, in, out] of the tensors of its experts."""
    count, rows, columns = shapes[path].shape
    by_expert: list[list[_Leaf]] = [[] for _ in range(count)]
    for entry in entries:
        start, stop = entry.columns or (0, columns)
        own = {path: jax.ShapeDtypeStruct((rows, stop - start), shapes[path].dtype)}
        by_expert[entry.expert].append(_leaf(entry, path, own, read, dtype))
    return _Stack([parts[0] if len(parts) == 1 else _Columns(parts) for parts in by_expert])


def permuted(rows: int, heads: int) -> np.ndarray:
    """The index of jaxft's row (halves) for each row in llama.cpp's rotary order (adjacent pairs)."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def unpermuted(rows: int, heads: int) -> np.ndarray:
    """The index in llama.cpp's rotary order for each of jaxft's rows; the inverse of `permuted`."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _stacks(named, fetch, layers):
    """path -> leaf, with stacked layers."""
    first, inside = f"{layers}/0/", f"{layers}/"
    depth = len({p.removeprefix(inside).split("/")[0] for p in named if p.startswith(inside)})
    result = {}
    for path in named:
        if not path.startswith(inside):
            result[path] = fetch(path)
        elif path.startswith(first):
            rest = path.removeprefix(first)
            result[inside + rest] = _Stack([fetch(f"{inside}{i}/{rest}") for i in range(depth)])
    return result


def _place(leaf: _Leaf | _Stack, sharding: Sharding | Weight | None) -> WeightLike:
    """The leaf as an array, read one shard at a time; or as a weight, read whole."""
    if leaf.structured:
        return jax.device_put(leaf.weight(), sharding)
    if sharding is None:
        return jnp.asarray(leaf[tuple(slice(0, n) for n in leaf.shape)])
    devices: dict[tuple, list[jax.Device]] = {}  # keyed by their part
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, holders in devices.items():
        part = leaf[tuple(slice(*bound) for bound in bounds)]
        shards += [jax.device_put(part, device) for device in holders]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def flatten(tree: Params) -> dict[str, Any]:
    """path -> leaf or weight."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]
    return {path_name(path): leaf for path, leaf in flat}


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


def stacked_shapes(shapes: Params, layers: str = LAYERS) -> Params:
    """The same with layers stacked."""
    return jax.eval_shape(lambda tree: stack_layers(tree, layers), shapes)
