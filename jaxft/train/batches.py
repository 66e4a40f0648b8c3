"""Batches: iteration, data position, device placement."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxft.keys import stream
from jaxft.parallel import (
    batch_sharding,
    lay_out,
    path_name,
    replicated,
    row_shards,
    to_host,
    token_sharding,
)
from jaxft.train.books import is_like, type_of
from jaxft.train.state import TrainState, own

# collect: (params, carry, key) -> (batch, carry)
Batches = Iterable[Any] | Callable[[Any, Any, jax.Array], tuple[Any, Any]]

# Leaves [B, ..., T] of a batch, whose tokens lie over the mesh's context axis.
TOKENS = ("tokens", "loss_mask", "segment_ids", "positions")


class BatchSource:
    """Yields batches from an iterable, an iterator or a collect function, and tracks the position.

    The position is the result of the batches' get_state() as JSON if they have it (Grain iterators do).
    Otherwise iterators are replayed from the start, which is exact if they are deterministic. A collect
    function keeps its state in the carry.
    """

    def __init__(self, batches: Batches):
        self._is_function = is_function(batches)
        self._batches = batches if self._is_function else _each(batches)
        self._taken, self._key = 0, None

    def next(self, state: TrainState, step: int, mesh: Mesh | None) -> tuple[Any, TrainState]:
        """Returns (the batch of a step, the state with the carry that the collect function returned).

        At the end (StopIteration, or a batch that is None) the batch is None.
        """
        if self._is_function:
            # Local to this process: the sampling program may differ between hosts.
            self._key = _own_key(state) if self._key is None else self._key
            key = stream(self._key, "collect", step)
            batch, carry = _pair(self._batches(state.params, state.carry, key))
            state = state._replace(carry=_next_carry(carry, state, batch, mesh))
        else:
            batch = next(self._batches, None)
        self._taken += batch is not None
        return batch, state

    def close(self) -> None:
        """Calls the `close` of a collect function that has one, to end its threads."""
        if self._is_function and hasattr(self._batches, "close"):
            self._batches.close()

    def position(self) -> dict[str, Any]:
        """The position that `seek` takes, as JSON."""
        if not hasattr(self._batches, "get_state"):
            return {"taken": self._taken}
        position = self._batches.get_state()
        if isinstance(position, bytes):
            return {"taken": self._taken, "bytes": base64.b64encode(position).decode()}
        return {"taken": self._taken, "state": position}

    def seek(self, position: dict[str, Any]) -> None:
        """Advances a fresh source to `position`."""
        self._taken = position["taken"]
        if "bytes" in position:
            self._batches.set_state(base64.b64decode(position["bytes"]))
        elif "state" in position:
            self._batches.set_state(position["state"])
        elif not self._is_function:
            skipped = sum(1 for _ in itertools.islice(self._batches, self._taken))
            if skipped < self._taken:
                raise ValueError(
                    f"resume: the run had taken {self._taken} batches, but these end after "
                    f"{skipped}; pass the same batches as before, from their start."
                )


def with_start(state: TrainState, batches: Batches) -> TrainState:
    """Adds the missing entries of `batches.carry`, the start values of a collect function, to the carry.

    Raises:
        ValueError: if the state's carry has no names.
    """
    start = getattr(batches, "carry", None) if is_function(batches) else None
    if start is None:
        return state
    if state.carry is not None and not isinstance(state.carry, dict):
        raise ValueError(
            f"fit: batches have entries {sorted(start)} of the carry, which must then be a dict of named "
            f"entries; got {type(state.carry).__name__}."
        )
    carry = state.carry or {}
    missing = {name: entry for name, entry in start.items() if name not in carry}
    return state._replace(carry=carry | jax.tree.map(jnp.array, missing))


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Places a batch: rows over the mesh's data, fsdp and expert axes; unchanged without a mesh.

    In the leaves that TOKENS names, the tokens of a row lie over the context axis. With several processes,
    each passes its own rows; leaves without axes must be the same in every process.

    Raises:
        ValueError: if the mesh does not divide the rows or the tokens, if processes share rows, or if a
            column is not numeric, such as text.
    """
    _check_numbers(batch)
    if mesh is None:
        return jax.device_put(batch)
    check_hosts(mesh)
    parts, context = row_shards(mesh), mesh.shape["context"]

    def place(path, leaf):
        if isinstance(leaf, jax.Array) and _on_mesh(leaf, mesh):
            return leaf
        if np.ndim(leaf) == 0:
            return lay_out(leaf, replicated(mesh))
        name = path_name(path)
        rows, sharding = len(leaf) * jax.process_count(), batch_sharding(mesh)
        if name in TOKENS and np.ndim(leaf) > 1:
            sharding = token_sharding(mesh, np.ndim(leaf))
            if np.shape(leaf)[-1] % context:
                raise ValueError(
                    f"fit: rows of {np.shape(leaf)[-1]} in {name!r} cannot be laid over context = {context} "
                    f"devices; make their length a multiple of {context} (--max-length, --context)."
                )
        if rows % parts:
            raise ValueError(
                f"fit: {rows} rows of {name!r} cannot be laid over data x fsdp x expert = {parts} devices; "
                f"make the batch a multiple of {parts}."
            )
        if isinstance(leaf, jax.Array) and jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree_util.tree_map_with_path(place, batch)


def check_hosts(mesh: Mesh) -> None:
    """Checks that each process has its own rows.

    Raises:
        ValueError: if devices of several processes, which read different rows, would hold the same rows.
    """
    if jax.process_count() == 1:
        return
    parts, owners = row_shards(mesh), {}
    for device, index in batch_sharding(mesh).devices_indices_map((parts,)).items():
        owners.setdefault(index[0].start, set()).add(device.process_index)
    if any(len(processes) > 1 for processes in owners.values()):
        shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"the mesh {shape} lays the same rows of a batch over several of the {jax.process_count()} "
            "processes, each of which reads its own; keep tensor x context within the devices of one."
        )


def place_on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Copies each leaf that is not on the mesh yet to all of the mesh's devices."""
    if mesh is None:
        return tree
    whole = replicated(mesh)
    return jax.tree.map(lambda x: x if _on_mesh(x, mesh) else lay_out(x, whole), tree)


def _on_mesh(leaf: Any, mesh: Mesh) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def iterate(batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Starts a fresh pass over a re-iterable, or over the iterable that a function returns."""
    return _each(batches() if is_function(batches) else batches)


def is_function(batches: Any) -> bool:
    """Returns whether `batches` is called rather than iterated."""
    return callable(batches) and not hasattr(batches, "__iter__")


def _each(batches):
    if isinstance(batches, Mapping):
        raise ValueError(
            f"fit: batches is one dict, with {sorted(map(str, batches))}, whose keys would be the batches; "
            "pass an iterable of batches, such as [batch] or itertools.repeat(batch, steps)."
        )
    return iter(batches)


def _pair(returned):
    """Checks the (batch, carry) of a collect function: a dict of two columns would unpack to names."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        got = type(returned).__name__
        if isinstance(returned, Mapping):
            got = f"one dict, with {sorted(map(str, returned))}"
        raise ValueError(
            f"collect: it must return (batch, carry), got {got}; if there is nothing to remember, return the "
            "carry that it received: (batch, carry)."
        )
    return returned


def _check_numbers(batch):
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        # Text, dates and Python objects; NumPy's kind of bfloat16 and similar types is "V".
        if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind in "OSUMm":
            name = path_name(path)
            raise ValueError(
                f"fit: {name!r} of the batch has {type(leaf).__name__} {str(leaf)[:40]!r}, but batches hold "
                "only numbers; convert it (text to tokens) or leave it out."
            )


def _own_key(state):
    """The state's key as an array of only this process."""
    data = to_host(jax.random.key_data(state.key))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(state.key))


def _next_carry(new, state, batch, mesh):
    """Returns the collect function's new carry: same shardings as before, in its own memory."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(new)
    named = {path_name(path): leaf for path, leaf in flat}
    known = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(state.carry)}
    if lost := sorted(known.keys() - named.keys()):
        raise ValueError(f"collect: the carry that it returned has no {lost[0]!r} any more.")
    changed = {name: x for name, x in named.items() if x is not known.get(name)}
    placed = {n: _placed(n, x, known.get(n), mesh) for n, x in changed.items()}
    if any(isinstance(x, jax.Array) for x in changed.values()):
        # Steps overwrite the carry: arrays shared with the batch or the params would be freed with it.
        same = [x for name, x in named.items() if name not in changed]
        placed = own(placed, (batch, state.params, state.opt_state, same))
    return treedef.unflatten([(named | placed)[name] for name in named])


def _placed(name, leaf, before, mesh):
    x = (
        leaf if isinstance(leaf, jax.Array) else np.array(leaf)
    )  # a copy: it may be changed in place
    if before is not None:
        if not is_like(leaf, before):
            raise ValueError(
                f"collect: {name!r} of the carry was {type_of(before)} and is now {type_of(leaf)}; entries "
                "keep their shapes and types."
            )
        x = x.astype(before.dtype)
    if mesh is None or _on_mesh(x, mesh):
        return jnp.asarray(x)
    return lay_out(x, before.sharding if _on_mesh(before, mesh) else replicated(mesh))
