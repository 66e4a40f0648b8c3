"""Vector-based random matrix adaptation."""

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
    is_weight,
    matmul,
    to_dense,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraWeight(Weight):
    """W + A diag(d) B diag(e), of which the vectors d and e train; A and B are random.

    VeRA: Kopiczko et al., 2023, arxiv.org/abs/2310.11454, eq. 2 (there for columns).
    """

    base: WeightLike = frozen_field()  # W [D, F]
    a: jax.Array = frozen_field()  # [D, R]
    b: jax.Array = frozen_field()  # [R, F]
    d: jax.Array  # [R]
    e: jax.Array  # [F], zeros at first

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

    def rmatmul(self, x):
        fixed = lambda leaf: jax.lax.stop_gradient(leaf).astype(x.dtype)
        vector = lambda leaf: along_last(leaf, x).astype(x.dtype)
        update = (((x @ fixed(self.a)) * vector(self.d)) @ fixed(self.b)) * vector(self.e)
        return matmul(x, jax.lax.stop_gradient(self.base)) + update

    def to_dense(self):
        a, b = jax.lax.stop_gradient((self.a, self.b))
        base = jax.lax.stop_gradient(to_dense(self.base))
        update = ((a * self.d[None]) @ b) * self.e[None]
        return (base.astype(jnp.float32) + update).astype(base.dtype)

    def with_specs(self, spec):
        *stack, rows, columns = (*(None,) * (self.ndim - len(spec)), *spec)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        p = PartitionSpec
        return VeraWeight(
            base,
            p(*stack, rows, None),
            p(*stack, None, columns),
            p(*stack, None),
            p(*stack, columns),
        )


def vera_weight(
    key: jax.Array, kernel: WeightLike, *, rank: int = 256, initial: float = 0.1, seed: int = 0
) -> VeraWeight:
    """A VeraWeight that equals `kernel` [D, F].

    A is uniform in ±1/sqrt(D) and B in ±1/sqrt(R), cut from one random table that `seed` names, so
    all layers share them up to the scale of A, and an adapter is its two vectors and the seed.
    `key` is not used.

    Raises:
        ValueError: for a kernel that is no matrix, or a rank below 1.
    """
    del key
    if len(kernel.shape) != 2 or rank < 1:
        raise ValueError(
            f"vera: needs a matrix [in, out] and a rank of at least 1, got a weight of shape "
            f"{kernel.shape} and rank {rank}."
        )
    rows, columns = kernel.shape
    keys = jax.random.split(jax.random.key(seed))
    # The counter-based generator gives a smaller table as the first rows of a larger one.
    draw = lambda k, size, bound: (
        jax.random.uniform(k, (size, rank), jnp.float32, -1.0, 1.0) * bound
    )
    a, b = draw(keys[0], rows, rows**-0.5), draw(keys[1], columns, rank**-0.5).T
    return VeraWeight(kernel, a, b, jnp.full(rank, initial, jnp.float32), jnp.zeros(columns))
