"""How the arrays of an attention lie over the mesh in context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxft.parallel.axes import free_axes, head_axes, length_axes, row_axes


class Layout(NamedTuple):
    """The axes of the mesh over which each axis of the arrays is split; () where it is not."""

    axes: dict[str, int]  # name -> size of all that no shard_map maps already
    rows: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def shards(self) -> int:
        """Parts into which the tokens of a row are split."""
        return math.prod(self.axes[name] for name in self.length)

    @property
    def tokens(self) -> PartitionSpec:
        """Of segment ids [B, T]."""
        return PartitionSpec(self.rows, self.length)

    @property
    def states(self) -> PartitionSpec:
        """Of queries, keys and values [B, T, heads, K]."""
        return PartitionSpec(self.rows, self.length, self.heads)

    def whole(self, x):
        """Within `mapped`: x [B, T / shards, ...] with the tokens of all devices of its rows."""
        return jax.lax.all_gather(x, self.length, axis=1, tiled=True) if self.length else x

    def mapped(self, run: Callable[..., jax.Array], in_specs: tuple) -> Callable[..., jax.Array]:
        """`run` on each device over its own part, for an output like the queries."""
        if math.prod(self.axes.values()) == 1:
            return run
        # All axes: a collective over some has XLA gather over the others too, as kernels do. The check would
        # need kernels to say over which axes their outputs vary.
        return jax.shard_map(
            run,
            in_specs=in_specs,
            out_specs=self.states,
            axis_names=set(self.axes),
            check_vma=False,
        )


def attention_layout(query: jax.Array, key: jax.Array) -> Layout:
    """The layout of queries [B, T, H, K] and keys [B, T, G, K]: an axis that divides nothing is left out."""
    rows, length = query.shape[:2]
    return Layout(free_axes(), row_axes(rows), length_axes(length), head_axes(key.shape[2]))
