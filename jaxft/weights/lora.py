"""Low-rank adaptation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.weights.base import (
    Frozen,
    Weight,
    WeightLike,
    frozen_field,
    frozen_grouped,
    frozen_matmul,
    grouped,
    is_weight,
    matmul,
    split_spec,
    to_dense,
    wide,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight(Weight):
    """W + (α/R) A B with W frozen, for rows x.

    LoRA: Hu et al., 2021, arxiv.org/abs/2106.09685, eq. 3 (there for columns, so A and B swap).
    """

    base: WeightLike = frozen_field()  # W [D, F]
    a: jax.Array  # [D, R]
    b: jax.Array  # [R, F], zeros at first, so that training starts from W
    alpha: float = dataclasses.field(default=16.0, metadata={"static": True})
    # Whether `base` is PiSSA's quantised residual: then A B is not a change of W, as in PEFT's files.
    rounded_rest: bool = dataclasses.field(default=False, metadata={"static": True})

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
        # (x A) B costs R (D + F) per row; x (A B) would cost D F and store a dense update. Scaling B
        # rather than the product saves a pass over the outputs.
        update = matmul(matmul(x, self.a), self.b * (self.alpha / self.rank))
        return frozen_matmul(x, self.base) + update

    def rgrouped(self, x, sizes):
        update = grouped(grouped(x, self.a, sizes), self.b * (self.alpha / self.rank), sizes)
        return frozen_grouped(x, self.base, sizes) + update

    def rconv(self, x, convolve):
        # R channels through the window, then a product at each place, as in PEFT's Conv2d.
        update = matmul(convolve(x, self.a), self.b * (self.alpha / self.rank))
        return Frozen(self.base).rconv(x, convolve) + update

    def to_dense(self):
        # The product is in float32 for any storage type: merging must not lose the trained update.
        base = to_dense(self.base)
        update = wide(self.a, base) @ wide(self.b, base)
        scaled = update * (self.alpha / self.rank)
        return (wide(base) + scaled).astype(base.dtype)

    def with_specs(self, spec):
        stack, rows, columns = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        # R is small: it is never split, so that x A is complete on each shard of W's columns.
        a, b = PartitionSpec(*stack, rows, None), PartitionSpec(*stack, None, columns)
        return dataclasses.replace(self, base=base, a=a, b=b)


def lora_weight(
    key: jax.Array, kernel: WeightLike, *, rank: int = 16, alpha: float = 32.0
) -> LoraWeight:
    """A LoraWeight that equals `kernel` [D, F]: A uniform in ±1/sqrt(D), B zero.

    The initialisation is PEFT's (Kaiming uniform with a = sqrt(5)). A and B
    are float32 for any data type of the kernel: an update below bfloat16's precision would be lost.

    Raises:
        ValueError: for a kernel that is not a matrix, or a rank outside 1..min(D, F).
    """
    if len(kernel.shape) != 2:
        raise ValueError(f"lora: needs a matrix [in, out], got a weight of shape {kernel.shape}.")
    rows, columns = kernel.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"lora: rank must lie in 1..{min(rows, columns)} for a kernel {kernel.shape}, got {rank}."
        )
    bound = rows**-0.5
    a = jax.random.uniform(key, (rows, rank), jnp.float32, -bound, bound)
    return LoraWeight(kernel, a, jnp.zeros((rank, columns), jnp.float32), float(alpha))


def pissa_weight(
    key: jax.Array,
    kernel: jax.Array,
    *,
    rank: int = 16,
    alpha: float = 16.0,
    quantise: Callable[[jax.Array], WeightLike] | None = None,
) -> LoraWeight:
    """A LoraWeight whose A B has the leading R singular triplets of `kernel`, and its base the residual.

    PiSSA: Meng et al., 2024, arxiv.org/abs/2404.02948, eq. 2 to 4. The sum is the kernel up to rounding.

    Args:
        key: unused; all rules of `adapt` take one.
        kernel: W [D, F], dense.
        rank: R.
        alpha: α; A B is scaled by α/R.
        quantise: rounds the residual, W - (α/R) A B, which becomes the base (QPiSSA, section 4: the residual
            has a narrower range than W and loses less). None: the residual stays dense.

    Raises:
        ValueError: see lora_weight; also for a kernel that is a structured weight.
    """
    if is_weight(kernel):
        raise ValueError(
            f"pissa: needs a dense kernel, got {type(kernel).__name__}; give the kernel before it was "
            "quantised, and `quantise` (the rule qpissa) to round the residual."
        )
    whole = lora_weight(key, kernel, rank=rank, alpha=alpha)
    u, s, v = jnp.linalg.svd(wide(kernel), full_matrices=False)
    root = jnp.sqrt(s[:rank] / (alpha / rank))
    a, b = u[:, :rank] * root[None], root[:, None] * v[:rank]
    rest = wide(kernel) - (a @ b) * (alpha / rank)
    rest = rest.astype(kernel.dtype)
    if quantise is None:
        return dataclasses.replace(whole, base=rest, a=a, b=b)
    return dataclasses.replace(whole, base=quantise(rest), a=a, b=b, rounded_rest=True)


def pissa_to_lora(weight: LoraWeight, kernel: jax.Array) -> LoraWeight:
    """A trained PiSSA weight as plain LoRA of rank 2R on the original kernel, which other tools can load.

    The difference of its base from the kernel has rank R, and the second half of the factors subtracts it.
    This applies to any initialisation that subtracts a product of rank R from the kernel, also to OLoRA's.
    """
    lacks = wide(kernel) - wide(to_dense(weight.base))
    u, s, v = jnp.linalg.svd(lacks, full_matrices=False)
    root = jnp.sqrt(s[: weight.rank] / (weight.alpha / weight.rank))
    a = jnp.concatenate([weight.a, u[:, : weight.rank] * root[None]], axis=1)
    b = jnp.concatenate([weight.b, -root[:, None] * v[: weight.rank]], axis=0)
    return LoraWeight(kernel, a, b, 2 * weight.alpha)
