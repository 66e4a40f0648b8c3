"""Sharding of an attention's arrays over the mesh in context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxft.parallel.axes import free_axes, head_axes, length_axes, row_axes


class Layout(NamedTuple):
    """The axes of the mesh over which each axis of the arrays is split; () where it is not."""

    axes: dict[str, int]  # name -> size of all axes that no shard_map maps already
    rows: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def shards(self) -> int:
        """Parts into which the tokens of a row are split."""
        return math.prod(self.axes[name] for name in self.length)

    @property
    def tokens(self) -> PartitionSpec:
        """Spec of segment ids [B, T]."""
        return PartitionSpec(self.rows, self.length)

    @property
    def states(self) -> PartitionSpec:
        """Spec of queries, keys and values [B, T, heads, K]."""
        return PartitionSpec(self.rows, self.length, self.heads)

    def whole(self, x):
        """Inside `mapped`: gathers x [B, T / shards, ...] over all devices that hold tokens of its rows."""
        return jax.lax.all_gather(x, self.length, axis=1, tiled=True) if self.length else x

    def mapped(self, run: Callable[..., jax.Array], in_specs: tuple) -> Callable[..., jax.Array]:
        """`run` on each device's own part; the output is sharded like the queries."""
        if math.prod(self.axes.values()) == 1:
            return run
        # Map all axes: with collectives or kernels over only some, XLA gathers over the others too.
        # check_vma would need kernels to state over which axes their outputs vary.
        return jax.shard_map(
            run,
            in_specs=in_specs,
            out_specs=self.states,
            axis_names=set(self.axes),
            check_vma=False,
        )


def attention_layout(query: jax.Array, key: jax.Array) -> Layout:
    """The layout of queries [B, T, H, K] and keys [B, T, G, K], without axes that divide no dimension."""
    rows, length = query.shape[:2]
    return Layout(free_axes(), row_axes(rows), length_axes(length), head_axes(key.shape[2]))
