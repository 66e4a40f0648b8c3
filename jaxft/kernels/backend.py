"""What the program being traced will run on, and whether a Pallas kernel can run there."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

ROW_AXES = ("data", "fsdp")  # of jaxft's meshes: a batch's rows lie over these
LENGTH_AXES = ("context",)  # and the tokens of a row over these


def target_platform() -> str:
    """The name "cpu", "gpu" or "tpu" of the mesh in context, else of the default backend.

    The two differ where a program is compiled for devices that are not here; `jax.set_mesh` puts a
    mesh in context, and so do the compiled steps of jaxft.train for the mesh that the params lie on.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one(platform: str) -> bool:
    """True on a "tpu" or "gpu" with one device in sight, or inside a shard_map over all axes of a mesh.

    XLA cannot split a kernel over the devices of a mesh by itself, so that under jit with sharded
    arrays the forms that it can split must be taken.
    """
    if target_platform() != platform:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return set(mesh.manual_axes) == set(mesh.axis_names) or mesh.size == 1


def free_axes() -> dict[str, int]:
    """Name -> size of the axes of the mesh in context that no shard_map maps already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def dividing(size: int, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are free axes and split `size` evenly, each what those before it left."""
    axes, taken = free_axes(), ()
    for name in names:
        if axes.get(name, 1) > 1 and size % axes[name] == 0:
            size, taken = size // axes[name], (*taken, name)
    return taken


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in context over which so many rows are split; () without, or in a shard_map."""
    return dividing(rows, ROW_AXES)


def length_axes(length: int) -> tuple[str, ...]:
    """The axes over which the tokens of rows so long are split, likewise."""
    return dividing(length, LENGTH_AXES)


def keep_tokens(x: jax.Array) -> jax.Array:
    """x [B, T, ...], its tokens kept where `row_axes` and `length_axes` have them.

    Left alone, XLA may multiply activations of the whole batch by each device's shard of a kernel and
    add up the products, rather than gather the kernel: FSDP then moves activations, many times as much.
    """
    rows, length = row_axes(x.shape[0]), length_axes(x.shape[1])
    if not rows and not length:
        return x
    # Rows that cannot be split evenly may lie as XLA likes.
    spec = PartitionSpec(rows or PartitionSpec.UNCONSTRAINED, length, *[None] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, spec)


def keep_features(x: jax.Array) -> jax.Array:
    """Rows x [B, T, D] of a table whose columns lie over "fsdp": so do x's, its tokens over the other axes.

    From there it is one exchange over "fsdp" to `keep_tokens`; left alone, XLA takes every row to every
    device on a mesh of three axes.
    """
    rows, length, features = (
        row_axes(x.shape[0]),
        length_axes(x.shape[1]),
        dividing(x.shape[2], ("fsdp",)),
    )
    if not set(features) <= set(rows) or not features:
        return x
    others = tuple(axis for axis in rows if axis not in features)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(others, length, features))
