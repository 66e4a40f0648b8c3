"""Sharding constraints of activations on the mesh in context."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from jaxft.parallel.axes import dividing, length_axes, row_axes


def keep_tokens(x: jax.Array) -> jax.Array:
    """x [B, T, ...] with its tokens sharded over `row_axes` and `length_axes`.

    Without this, XLA may multiply activations of the whole batch by each device's shard of a kernel
    and add up the products instead of gathering the kernel: FSDP then moves activations, which is
    many times as much.
    """
    rows, length = row_axes(x.shape[0]), length_axes(x.shape[1])
    if not rows and not length:
        return x
    # XLA chooses the layout of rows that cannot be split evenly.
    spec = PartitionSpec(rows or PartitionSpec.UNCONSTRAINED, length, *[None] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, spec)


def keep_features(x: jax.Array) -> jax.Array:
    """Rows x [B, T, D] of a table, with columns sharded over "fsdp" like the table's, tokens over other axes.

    From there `keep_tokens` needs one exchange over "fsdp"; without this, XLA sends every row to
    every device on a mesh of three axes.
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
