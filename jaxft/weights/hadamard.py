"""Low-rank Hadamard and Kronecker products: LoHa and LoKr."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.weights.base import (
    Weight,
    WeightLike,
    frozen_field,
    frozen_matmul,
    is_weight,
    split_spec,
    to_dense,
    wide,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LohaWeight(Weight):
    """W + (α/R) (A1 B1) ∘ (A2 B2), an update of rank up to R².

    LoHa: Hyeon-Woo et al., 2021 (FedPara), arxiv.org/abs/2108.06098, proposition 1.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    a1: jax.Array  # [D, R]
    b1: jax.Array  # [R, F]
    a2: jax.Array  # [D, R], zeros at first
    b2: jax.Array  # [R, F]
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
        return self.a1.shape[-1]

    def rmatmul(self, x):
        # The update has no cheaper product than its dense form, which is formed twice instead of kept.
        product = jax.checkpoint(lambda x, w: x @ w._update(x).astype(x.dtype))
        own = dataclasses.replace(self, base=None)
        return frozen_matmul(x, self.base) + product(x, own)

    def to_dense(self):
        base = jax.lax.stop_gradient(to_dense(self.base))
        return (wide(base) + self._update(base)).astype(base.dtype)

    def with_specs(self, spec):
        stack, rows, columns = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        a, b = PartitionSpec(*stack, rows, None), PartitionSpec(*stack, None, columns)
        return LohaWeight(base, a, b, a, b, self.alpha)

    def _update(self, like):
        a1, b1, a2, b2 = (wide(leaf, like) for leaf in (self.a1, self.b1, self.a2, self.b2))
        return (a1 @ b1) * (a2 @ b2) * (self.alpha / self.rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LokrWeight(Weight):
    """W + (α/R) U ⊗ V with V = A B or full; the Kronecker product is never formed to multiply.

    LoKr: Yeh et al., 2023 (LyCORIS), arxiv.org/abs/2309.14859, section 3.
    """

    base: WeightLike = frozen_field()  # W [D, F], D = D1 D2, F = F1 F2
    u: jax.Array  # [D1, F1], zeros at first
    v: jax.Array | None  # [D2, F2], or None with
    a: jax.Array | None  # [D2, R]
    b: jax.Array | None  # [R, F2]
    alpha: float = dataclasses.field(default=8.0, metadata={"static": True})
    rank: int = dataclasses.field(default=8, metadata={"static": True})  # R, also if V is full

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def rmatmul(self, x):
        cast = lambda leaf: leaf.astype(x.dtype)
        parts = x.reshape(*x.shape[:-1], self.u.shape[0], -1)
        if self.v is None:
            parts = (parts @ cast(self.a)) @ cast(self.b)
        else:
            parts = parts @ cast(self.v)
        update = jnp.einsum("...mk,ml->...lk", parts, cast(self.u))
        update = update.reshape(*x.shape[:-1], -1) * (self.alpha / self.rank)
        return frozen_matmul(x, self.base) + update

    def to_dense(self):
        base = jax.lax.stop_gradient(to_dense(self.base))
        part = lambda leaf: wide(leaf, base)
        v = part(self.a) @ part(self.b) if self.v is None else part(self.v)
        update = jnp.kron(part(self.u), v) * (self.alpha / self.rank)
        return (wide(base) + update).astype(base.dtype)

    def with_specs(self, spec):
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        whole = PartitionSpec()  # the parts are small, O(sqrt(D F)): replicated
        part = lambda leaf: None if leaf is None else whole
        parts = {name: part(getattr(self, name)) for name in ("v", "a", "b")}
        return dataclasses.replace(self, base=base, u=whole, **parts)


def loha_weight(
    key: jax.Array, kernel: WeightLike, *, rank: int = 8, alpha: float = 8.0
) -> LohaWeight:
    """A LohaWeight that equals `kernel` [D, F]; initialised as PEFT does (Kaiming, a = sqrt(5)).

    A1 is uniform in ±1/sqrt(D), B1 and B2 in ±1/sqrt(R), A2 zero.

    Raises:
        ValueError: for a kernel that is not a matrix, or a rank below 1.
    """
    _check("loha", kernel, rank)
    rows, columns = kernel.shape
    keys = jax.random.split(key, 3)
    return LohaWeight(
        kernel,
        _uniform(keys[0], (rows, rank)),
        _uniform(keys[1], (rank, columns)),
        jnp.zeros((rows, rank), jnp.float32),
        _uniform(keys[2], (rank, columns)),
        float(alpha),
    )


def lokr_weight(
    key: jax.Array, kernel: WeightLike, *, rank: int = 8, alpha: float = 8.0, factor: int = -1
) -> LokrWeight:
    """A LokrWeight that equals `kernel` [D, F], initialised as PEFT does.

    V is a product of rank R if R is smaller than half of V's larger side, and full otherwise.

    Args:
        key: draws V.
        kernel: the kernel.
        rank: R.
        alpha: α/R scales the update.
        factor: D1 and F1, if it divides D and F; -1 chooses factors near the square roots.

    Raises:
        ValueError: for a kernel that is not a matrix, or a rank below 1.
    """
    _check("lokr", kernel, rank)
    (rows1, rows2), (columns1, columns2) = (factorise(size, factor) for size in kernel.shape)
    keys = jax.random.split(key)
    v = a = b = None
    if rank < max(rows2, columns2) / 2:
        a, b = _uniform(keys[0], (rows2, rank)), _uniform(keys[1], (rank, columns2))
    else:
        v = _uniform(keys[0], (rows2, columns2))
    u = jnp.zeros((rows1, columns1), jnp.float32)
    return LokrWeight(kernel, u, v, a, b, float(alpha), rank)


def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = size: (factor, size / factor), or the nearest m ≤ n if that is not an integer.

    This is LyCORIS's rule, which PEFT follows: 128 -> (8, 16), 127 -> (1, 127); with factor 4, 128
    -> (4, 32). If `factor` does not divide `size`, m is the largest divisor up to it, if m ≤ n.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    m = next(m for m in range(largest, 0, -1) if size % m == 0)
    return m, size // m


def _uniform(key, shape):
    """Uniform values in ±1/sqrt(inputs), for factors that multiply rows."""
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) * shape[0] ** -0.5


def _check(name, kernel, rank):
    if len(kernel.shape) != 2 or rank < 1:
        raise ValueError(
            f"{name}: needs a matrix [in, out] and a rank of at least 1, got a weight of shape "
            f"{kernel.shape} and rank {rank}."
        )
