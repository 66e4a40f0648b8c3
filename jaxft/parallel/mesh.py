"""Meshes: one function makes them, with the axes that everything else names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "expert", "context")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices with jaxft's axes, of Auto type; one size may be -1 to fill.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor, expert, context]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"make_mesh: sizes must be positive, at most one of them -1; got {named}.")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"make_mesh: {named} does not fill {len(devices)} devices; set one size to -1."
        )
    # jax.make_mesh alone gives Explicit axes, under which linen's einsums ask for shardings.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def token_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """The same for tokens [B, ..., T] of `ndim` axes, which lie over the context axis too."""
    between = [None] * (ndim - 2)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *between, "context"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """`jax.set_mesh(mesh)`, or nothing: what is traced in it knows its devices and can shard kernels."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def in_turn(result: Any) -> Any:
    """`result`, awaited first where it comes from several CPU devices.

    Two programs with collectives at once can take the threads there that each other's wait for, and start
    in another order in another process; neither ever ends. TPUs and GPUs run programs in the order given.
    """
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
            if next(iter(leaf.sharding.device_set)).platform == "cpu":
                jax.block_until_ready(leaf)
    return result
