"""Full-rank updates from random bases: RandLoRA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.keys import stream
from jaxft.weights.base import (
    Weight,
    WeightLike,
    frozen_field,
    frozen_matmul,
    is_weight,
    split_spec,
    to_dense,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandloraWeight(Weight):
    """W + (α/R) Σ_n B_n diag(λ_n) A diag(γ_n): N random bases of rank R with trained scales.

    RandLoRA: Albert et al., 2025, arxiv.org/abs/2502.00987, eq. 4, with PEFT's order of columns and rows,
    which differ: component (k, n) of the scaled A meets column (n, k) of B. A and B are the first rows
    and columns of two tables that kernels of all shapes share; A is on the side of the smaller of D
    and F, and R N is at least that number, so that the update can have full rank.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    a: jax.Array = frozen_field()  # [R, min(D, F) or more]
    b: jax.Array = frozen_field()  # [max(D, F) or more, N or more, R]
    scale: jax.Array  # λ [R, N], zeros at first
    gamma: jax.Array  # γ [N, min(D, F)]
    alpha: float = dataclasses.field(default=640.0, metadata={"static": True})

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def rank(self) -> int:
        """R."""
        return self.scale.shape[-2]

    def rmatmul(self, x):
        # The factors are larger than the kernel: they are formed twice instead of kept.
        def product(x, w):
            left, right = (factor.astype(x.dtype) for factor in w._factors(self.shape))
            return (x @ left) @ right * (self.alpha / self.rank)

        own = dataclasses.replace(self, base=None)
        return frozen_matmul(x, self.base) + jax.checkpoint(product)(x, own)

    def to_dense(self):
        base = jax.lax.stop_gradient(to_dense(self.base))
        left, right = self._factors(self.shape)
        update = left @ right * (self.alpha / self.rank)
        return (base.astype(jnp.float32) + update).astype(base.dtype)

    def with_specs(self, spec):
        stack, *_ = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        # Shared with kernels of other shapes, and smaller than the base: replicated.
        matrix, tensor = PartitionSpec(*stack, None, None), PartitionSpec(*stack, None, None, None)
        return RandloraWeight(base, matrix, tensor, matrix, matrix, self.alpha)

    def _factors(self, shape):
        """([D, R N], [R N, F]) in float32."""
        small, large = min(shape), max(shape)
        a, b = jax.lax.stop_gradient((self.a[:, :small], self.b[:large, : self.scale.shape[1]]))
        scaled = self.scale[:, :, None] * a[:, None] * self.gamma[None]
        scaled = scaled.reshape(-1, small).astype(jnp.float32)  # component k N + n
        b = b.reshape(large, -1).astype(jnp.float32)  # column n R + k
        return (scaled.T, b.T) if shape[0] == small else (b, scaled)


def randlora_weight(
    key: jax.Array,
    kernel: WeightLike,
    *,
    rank: int = 32,
    alpha: float = 640.0,
    seed: int = 0,
    tables: tuple[jax.Array, jax.Array] | None = None,
) -> RandloraWeight:
    """A RandloraWeight that equals `kernel` [D, F]; initialised as in PEFT: λ zero, γ 1 / its longer side.

    Args:
        key: not used.
        kernel: the kernel.
        rank: R; about min(D, F)² / R numbers train, so a smaller rank trains more.
        alpha: α/R scales the update; 20 times the rank is usual.
        seed: of the tables.
        tables: (A, B) of `randlora_tables`, shared by several kernels; None: of this kernel's shape.

    Raises:
        ValueError: for a kernel that is not a matrix, a rank below 1, or tables too small for the kernel.
    """
    del key
    if len(kernel.shape) != 2 or rank < 1:
        raise ValueError(
            f"randlora: needs a matrix [in, out] and a rank of at least 1, got a weight of shape "
            f"{kernel.shape} and rank {rank}."
        )
    small, large = min(kernel.shape), max(kernel.shape)
    count = -(-small // rank)
    a, b = randlora_tables(kernel.shape, rank, seed) if tables is None else tables
    if a.shape[1] < small or b.shape[0] < large or b.shape[1] < count or len(a) != rank:
        raise ValueError(
            f"randlora: tables {a.shape} and {b.shape} are too small for a kernel {kernel.shape} and rank "
            f"{rank}; make them for the largest numbers of inputs and of outputs."
        )
    gamma = jnp.full((count, small), 1 / max(count, small), jnp.float32)
    return RandloraWeight(kernel, a, b, jnp.zeros((rank, count), jnp.float32), gamma, float(alpha))


def randlora_tables(
    shape: tuple[int, int], rank: int, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Random (A [R, min(D, F)], B [max(D, F), N, R]) of mean 0 and standard deviation 1, uniform as in PEFT.

    The values differ from PEFT's, which torch's generator draws in bfloat16; files hold the tables.

    Args:
        shape: (D, F), the largest numbers of inputs and outputs of the kernels that share them.
        rank: R.
        seed: of the draws.
    """
    small, large = min(shape), max(shape)
    key, sizes = jax.random.key(seed), {"A": (rank, small), "B": (large, -(-small // rank), rank)}
    uniform = lambda name: jax.random.uniform(
        stream(key, f"randlora {name}"), sizes[name], jnp.float32, -1.0, 1.0
    )
    return 3**0.5 * uniform("A"), 3**0.5 * uniform("B")
