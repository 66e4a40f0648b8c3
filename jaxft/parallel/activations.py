"""Where activations stay on the mesh in context."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from jaxft.parallel.axes import dividing, length_axes, row_axes


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
