"""Meshes with jaxft's axes, and shardings over them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxft.parallel.axes import LENGTH_AXES, ROW_AXES

AXES = ("data", "fsdp", "tensor", "expert", "context")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    slices: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices with jaxft's axes, of Auto type; one size may be -1: all remaining devices.

    Args:
        data, fsdp, tensor, expert, context: sizes. `expert` splits a batch's rows, as `fsdp` does, and the
            experts of a layer; other params have a copy on each of its devices.
        slices: groups of devices joined by a slower network: TPU slices or, if there is at most
            one, processes (hosts). Each holds `data` / `slices` whole copies of the model, so that
            only gradients move between slices. None: the number of TPU slices.
        devices: default: all.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices, or slices do not divide `data`.
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
    # jax.make_mesh by itself gives Explicit axes, under which linen's einsums ask for shardings.
    types = (AxisType.Auto,) * len(AXES)
    slices = len(_groups(devices, "slice_index")) if slices is None else slices
    if slices != 1:
        return Mesh(_over_slices(sizes, slices, devices), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def _groups(devices, name):
    return {getattr(device, name, 0) for device in devices}


def _over_slices(sizes, slices, devices) -> np.ndarray:
    tpu_slices = len(_groups(devices, "slice_index"))
    found = tpu_slices if tpu_slices > 1 else len(_groups(devices, "process_index"))
    if slices != found:
        kind = "TPU slice" if tpu_slices > 1 else "process"
        raise ValueError(
            f"make_mesh: slices={slices}, but the {len(devices)} devices are those of {found} {kind}(es)."
        )
    if sizes[0] % slices:
        raise ValueError(
            f"make_mesh: data={sizes[0]} must be a multiple of the {slices} slices, each of which holds "
            "whole copies of the model; the other sizes are within a slice."
        )
    inner, outer = [sizes[0] // slices, *sizes[1:]], [slices, *[1] * (len(sizes) - 1)]
    by_process = tpu_slices == 1
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process
    )


def row_shards(mesh: Mesh) -> int:
    """The number of parts into which the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data, fsdp and expert axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def token_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """`batch_sharding` for tokens [B, ..., T] of `ndim` axes, with T split over the context axis."""
    between = [None] * (ndim - 2)
    return NamedSharding(mesh, PartitionSpec(ROW_AXES, *between, LENGTH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def lay_out(x: Any, sharding: Sharding) -> jax.Array:
    """The value, which every process holds whole, as an array with the given sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # device_put refuses arrays bound to a device of this process, and keys.
    if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            lay_out(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def mesh_context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """`jax.set_mesh(mesh)`, or a null context: programs traced in it know their devices."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def in_turn(result: Any) -> Any:
    """Returns `result`; waits for it first if it is on several CPU devices.

    On CPUs two concurrent programs with collectives can take threads that the other's collectives
    need, and can start in different orders in different processes, which is a deadlock. TPUs and
    GPUs run programs in the order given.
    """
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
            if next(iter(leaf.sharding.device_set)).platform == "cpu":
                jax.block_until_ready(leaf)
    return result
