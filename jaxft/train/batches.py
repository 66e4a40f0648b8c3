"""Where batches come from and where they go: iteration, data position, device placement."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from jaxft.parallel import batch_sharding, replicated, token_sharding
from jaxft.train.state import TrainState

Batches = Iterable[Any] | Callable[[TrainState], Any]

# Leaves [B, ..., T] of a batch, whose tokens lie over the mesh's context axis.
TOKENS = ("tokens", "loss_mask", "segment_ids", "positions")


class BatchSource:
    """`next(state)` over an iterable, an iterator or a function of the state, with a position.

    The position is get_state() of the batches where they have it (Grain iterators do), as JSON.
    Without it, iterators are replayed from the start, which is exact if they are deterministic;
    a function of the state has no position of its own.
    """

    def __init__(self, batches: Batches):
        self._is_function = is_function(batches)
        self._batches = batches if self._is_function else iter(batches)
        self._taken = 0

    def next(self, state: TrainState) -> Any:
        """The next batch; StopIteration (or None from a function) is the end, returned as None."""
        batch = self._batches(state) if self._is_function else next(self._batches, None)
        self._taken += batch is not None
        return batch

    def position(self) -> dict[str, Any]:
        """What `seek` needs, as JSON."""
        if not hasattr(self._batches, "get_state"):
            return {"taken": self._taken}
        position = self._batches.get_state()
        if isinstance(position, bytes):
            return {"taken": self._taken, "bytes": base64.b64encode(position).decode()}
        return {"taken": self._taken, "state": position}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes on after `position`, on a fresh source."""
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


class StateBatches:
    """(state) -> the next batch, with what each `add(state, batch)` puts beside it.

    Its position, for checkpoints, is that of the batches: all else follows from the state.

    Args:
        batches: an iterator with `get_state` and `set_state`.
        adds: (state, batch) -> batch each, such as `moving_reference_log_probs`.
    """

    def __init__(self, batches: Iterator[Any], *adds: Callable[[TrainState, Any], Any]):
        self._batches, self._adds = batches, adds

    def __call__(self, state: TrainState) -> Any:
        """The batch of the state's step."""
        batch = next(self._batches)
        for add in self._adds:
            batch = add(state, batch)
        return batch

    def get_state(self) -> Any:
        """The position of the batches."""
        return self._batches.get_state()

    def set_state(self, position: Any) -> None:
        """Goes on from a position."""
        self._batches.set_state(position)


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """The batch on the devices: rows over the mesh's data and fsdp axes, or as it is without mesh.

    The tokens of a row, in the leaves that TOKENS names, lie over the context axis. On several processes each
    passes its own rows; leaves without axes are the same everywhere.

    Raises:
        ValueError: if the mesh does not divide the rows or the tokens, or if processes share rows.
    """
    if mesh is None:
        return jax.device_put(batch)
    check_hosts(mesh)
    parts, context = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]

    def place(path, leaf):
        if isinstance(leaf, jax.Array) and _on_mesh(leaf, mesh):
            return leaf
        if np.ndim(leaf) == 0:
            return lay_out(leaf, replicated(mesh))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
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
                f"fit: {rows} rows of {name!r} cannot be laid over data x fsdp = {parts} devices; "
                f"make the batch a multiple of {parts}."
            )
        if isinstance(leaf, jax.Array) and jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree_util.tree_map_with_path(place, batch)


def check_hosts(mesh: Mesh) -> None:
    """Whether each process has rows of its own.

    Raises:
        ValueError: if the same rows would lie on devices of several processes, which read different ones.
    """
    if jax.process_count() == 1:
        return
    parts, owners = mesh.shape["data"] * mesh.shape["fsdp"], {}
    for device, index in batch_sharding(mesh).devices_indices_map((parts,)).items():
        owners.setdefault(index[0].start, set()).add(device.process_index)
    if any(len(processes) > 1 for processes in owners.values()):
        shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"the mesh {shape} lays the same rows of a batch over several of the {jax.process_count()} "
            "processes, each of which reads its own; keep tensor x context within the devices of one."
        )


def place_on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with each leaf that is not laid over the mesh yet copied to all of its devices."""
    if mesh is None:
        return tree
    whole = replicated(mesh)
    return jax.tree.map(lambda x: x if _on_mesh(x, mesh) else lay_out(x, whole), tree)


def lay_out(x: Any, sharding: Sharding) -> jax.Array:
    """The value, which all processes have whole, as an array of the given sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # device_put refuses arrays bound to a device of this process, and keys.
    if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            lay_out(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _on_mesh(leaf: Any, mesh: Mesh) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def iterate(batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """A fresh pass over batches that can be iterated again, or over what a function returns."""
    return iter(batches() if is_function(batches) else batches)


def is_function(batches: Any) -> bool:
    """Whether `batches` is to be called rather than iterated."""
    return callable(batches) and not hasattr(batches, "__iter__")
