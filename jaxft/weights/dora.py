"""Weight-decomposed low-rank adaptation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.weights.base import (
    Weight,
    WeightLike,
    along_last,
    frozen_field,
    matmul,
    split_spec,
    to_dense,
    wide,
)
from jaxft.weights.lora import LoraWeight, lora_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoraWeight(Weight):
    """(W + (α/R) A B) m / n: a direction by LoRA, and the length m of each column.

    DoRA: Liu et al., 2024, arxiv.org/abs/2402.09353, eq. 5 and 11: n, the lengths of the columns of
    W + (α/R) A B, gets no gradient.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    a: jax.Array  # [D, R]
    b: jax.Array  # [R, F]
    magnitude: jax.Array  # m [F]
    alpha: float = dataclasses.field(default=16.0, metadata={"static": True})

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-1]

    @property
    def direction(self) -> LoraWeight:
        """W + (α/R) A B."""
        return LoraWeight(self.base, self.a, self.b, self.alpha)

    def rmatmul(self, x):
        y = matmul(x, self.direction)
        return y * along_last(self._gain(), y).astype(x.dtype)

    def rconv(self, x, convolve):
        y = self.direction.rconv(x, convolve)
        return y * along_last(self._gain(), y).astype(x.dtype)

    def to_dense(self):
        return (self._updated() * self._gain()[None]).astype(self.dtype)

    def with_specs(self, spec):
        stack, _, columns = split_spec(spec, self.ndim)
        inner = self.direction.with_specs(spec)
        magnitude = PartitionSpec(*stack, columns)
        return dataclasses.replace(self, base=inner.base, a=inner.a, b=inner.b, magnitude=magnitude)

    def _updated(self):
        base = wide(jax.lax.stop_gradient(to_dense(self.base)))
        update = wide(self.a, base) @ wide(self.b, base)
        return base + update * (self.alpha / self.rank)

    def _gain(self):
        norm = jnp.linalg.norm(jax.lax.stop_gradient(self._updated()), axis=0)
        # A column of zeros has no direction to scale.
        return self.magnitude / jnp.where(norm == 0, 1.0, norm)


def dora_weight(
    key: jax.Array, kernel: WeightLike, *, rank: int = 16, alpha: float = 32.0
) -> DoraWeight:
    """A DoraWeight that equals `kernel` [D, F]; see lora_weight for A, B and the errors raised."""
    inner = lora_weight(key, kernel, rank=rank, alpha=alpha)
    magnitude = jnp.linalg.norm(wide(to_dense(kernel)), axis=0)
    return DoraWeight(kernel, inner.a, inner.b, magnitude, inner.alpha)
