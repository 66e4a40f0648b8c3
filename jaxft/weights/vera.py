"""Vector-based random matrix adaptation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxft.weights.base import (
    Weight,
    WeightLike,
    along_last,
    frozen_field,
    frozen_matmul,
    is_weight,
    split_spec,
    to_dense,
    wide,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraWeight(Weight):
    """W + A diag(d) B diag(e), where the vectors d and e train; A and B are random.

    VeRA: Kopiczko et al., 2023, arxiv.org/abs/2310.11454, eq. 2 (there for columns). A and B are the
    first rows and columns of two tables, which kernels of all shapes share: one array in many places
    of a params tree (stacked layers have one copy each).
    """

    base: WeightLike = frozen_field()  # W [D, F]
    a: jax.Array = frozen_field()  # [D or more, R]
    b: jax.Array = frozen_field()  # [R, F or more]
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
        a, b = (leaf.astype(x.dtype) for leaf in self._tables())
        vector = lambda leaf: along_last(leaf, x).astype(x.dtype)
        update = (((x @ a) * vector(self.d)) @ b) * vector(self.e)
        return frozen_matmul(x, self.base) + update

    def to_dense(self):
        base = jax.lax.stop_gradient(to_dense(self.base))
        a, b, d, e = (wide(leaf, base) for leaf in (*self._tables(), self.d, self.e))
        update = ((a * d[None]) @ b) * e[None]
        return (wide(base) + update).astype(base.dtype)

    def with_specs(self, spec):
        stack, _, columns = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        # Longer than this kernel's axes and shared with other kernels: replicated.
        table, d, e = (PartitionSpec(*stack, *rest) for rest in ((None, None), (None,), (columns,)))
        return VeraWeight(base, table, table, d, e)

    def _tables(self):
        rows, columns = self.shape
        return jax.lax.stop_gradient((self.a[:rows], self.b[:, :columns]))


def vera_weight(
    key: jax.Array,
    kernel: WeightLike,
    *,
    rank: int = 256,
    initial: float = 0.1,
    seed: int = 0,
    tables: tuple[jax.Array, jax.Array] | None = None,
) -> VeraWeight:
    """A VeraWeight that equals `kernel` [D, F].

    Args:
        key: not used.
        kernel: the kernel.
        rank: R.
        initial: initial value of d.
        seed: of the tables.
        tables: (A, B) of `vera_tables`, shared by several kernels; None: of this kernel's shape.

    Raises:
        ValueError: for a kernel that is not a matrix, a rank below 1, or tables too small for the kernel.
    """
    del key
    if len(kernel.shape) != 2 or rank < 1:
        raise ValueError(
            f"vera: needs a matrix [in, out] and a rank of at least 1, got a weight of shape "
            f"{kernel.shape} and rank {rank}."
        )
    rows, columns = kernel.shape
    a, b = vera_tables(kernel.shape, rank, seed) if tables is None else tables
    if a.shape[0] < rows or b.shape[1] < columns or not a.shape[1] == b.shape[0] == rank:
        raise ValueError(
            f"vera: tables {a.shape} and {b.shape} are too small for a kernel {kernel.shape} and rank "
            f"{rank}; make them for the largest numbers of inputs and of outputs."
        )
    d = jnp.full(rank, initial, jnp.float32)
    return VeraWeight(kernel, a, b, d, jnp.zeros(columns, jnp.float32))


def vera_tables(shape: tuple[int, int], rank: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """The random (A [D, R], B [R, F]) that PEFT makes from a `projection_prng_key`, up to rounding.

    Kaiming uniform: A in ±sqrt(6 / D), B in ±sqrt(6 / R). They are drawn as in torch, A^T before
    B^T, from the 24 low bits of the Mersenne twister's words, so that files without tables can be
    read.

    Args:
        shape: (D, F), the largest numbers of inputs and outputs of the kernels that share them.
        rank: R.
        seed: PEFT's projection_prng_key.
    """
    words = np.random.RandomState(seed)

    def draw(rows, columns):
        bits = words.randint(0, 2**32, (rows, columns), np.uint32) & 0xFFFFFF
        return np.float32((2.0**-23 * bits - 1.0) * (6 / columns) ** 0.5)

    a, b = draw(rank, shape[0]), draw(shape[1], rank)
    return jnp.asarray(a.T), jnp.asarray(b.T)
