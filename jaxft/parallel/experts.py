"""Layout of a mixture of experts over the mesh in context: experts over `expert`, tokens over all axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxft.kernels.backend import target_platform
from jaxft.parallel.axes import EXPERT_AXIS, HEAD_AXES, LENGTH_AXES, dividing, free_axes, row_axes
from jaxft.weights import is_weight


class ExpertLayout(NamedTuple):
    """The axes of the mesh over which the tokens [B, T] of a layer with experts are split."""

    axes: dict[str, int]  # name -> size of all axes that no shard_map maps already
    rows: tuple[str, ...]
    length: tuple[str, ...]

    @property
    def split(self) -> int:
        """Parts into which the experts are split."""
        return self.axes.get(EXPERT_AXIS, 1)

    def exchanges(self, per_token: int) -> bool:
        """Returns whether rows are sent to their experts; else all tokens along `expert` are gathered.

        Gathering moves P - 1 rows of each token and as many sums back, an exchange k (P - 1) / P at most.
        """
        fewer = EXPERT_AXIS in self.rows and per_token < self.split
        return fewer and target_platform() != "cpu"

    def first(self, count: int) -> jax.Array | int:
        """Inside `mapped`: the number of this device's first expert, of which it has `count`."""
        return jax.lax.axis_index(EXPERT_AXIS) * count if self.split > 1 else 0

    def gathered(self, x: jax.Array) -> jax.Array:
        """Inside `mapped`: the rows x [B, ...] of all devices along `expert`."""
        if EXPERT_AXIS not in self.rows:
            return x
        return jax.lax.all_gather(x, EXPERT_AXIS, axis=0, tiled=True)

    def summed(self, y: jax.Array) -> jax.Array:
        """Inside `mapped`: this device's rows of the sum of all parts of y [B, ...] along `expert`."""
        if self.split == 1:
            return y
        if EXPERT_AXIS not in self.rows:
            return jax.lax.psum(y, EXPERT_AXIS)
        return jax.lax.psum_scatter(y, EXPERT_AXIS, scatter_dimension=0, tiled=True)

    def mapped(self, run: Callable[..., jax.Array], *kernels: Any) -> Callable[..., jax.Array]:
        """run(x, chosen, gates, *kernels) on each device's tokens and experts.

        A device gets its experts whole: over `fsdp` and `tensor`, XLA gathers their shards before the call
        and scatters their gradients after it. So any structured weight is computed as on one device.
        """
        if math.prod(self.axes.values()) == 1:
            return run
        spec = PartitionSpec(EXPERT_AXIS if self.split > 1 else None)
        specs = [k.with_specs(spec) if is_weight(k) else spec for k in kernels]
        tokens = PartitionSpec(self.rows, self.length)
        return jax.shard_map(
            run,
            in_specs=(tokens, tokens, tokens, *specs),
            out_specs=tokens,
            axis_names=set(self.axes),
            check_vma=False,
        )


def expert_layout(x: jax.Array, count: int) -> ExpertLayout:
    """The layout of tokens x [B, T, D] and `count` experts.

    Raises:
        ValueError: if the mesh's axis `expert` does not divide the experts.
    """
    axes, (rows, length) = free_axes(), x.shape[:2]
    check_experts(count, axes.get(EXPERT_AXIS, 1))
    return ExpertLayout(axes, row_axes(rows), dividing(length, (*LENGTH_AXES, *HEAD_AXES)))


def check_experts(count: int, parts: int) -> None:
    """Raises ValueError if `count` experts cannot be split into `parts` equal parts."""
    if count % parts:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"the mesh's axis expert={parts} does not divide the {count} experts of a layer; choose one of "
            f"{', '.join(map(str, divisors))}, and put the other devices on fsdp or data."
        )
