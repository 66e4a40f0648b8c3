"""Rotations of a kernel's inputs: OFT in blocks, and BOFT by butterfly factors."""

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
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OftWeight(Weight):
    """diag(R_1, ..., R_n) W: blocks of inputs are rotated, then multiplied by a frozen kernel.

    OFT: Qiu et al., 2023, arxiv.org/abs/2306.07280, section 3: R = (I - Q) (I + Q)⁻¹ (Cayley) of a
    skew-symmetric Q. With `terms`, as in OFTv2 (Qiu et al., 2025, arxiv.org/abs/2506.19847, eq. 5), R is
    a truncated Neumann series of (I + Q) (I - Q)⁻¹: I + 2 Q + 2 Q² + ..., which is a rotation by the
    opposite angle, up to the truncation. The series is that of PEFT since 0.18, whose last term has
    coefficient 1; its series of 3 and of 4 terms are equal.

    With `eps` (COFT), Q is replaced by its projection onto the ball of radius eps / √n, where n is the number
    of stored blocks. The gradient is taken at the projection, as in PEFT, which writes the projection into
    the parameter.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    skew: jax.Array  # [n, block (block - 1) / 2], Q above its diagonal; n is 1 if blocks share it
    block: int = dataclasses.field(metadata={"static": True})  # inputs of a rotation; divides D
    terms: int | None = dataclasses.field(default=None, metadata={"static": True})
    eps: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def rmatmul(self, x):
        return frozen_matmul(_rotate(x, self.rotations()), self.base)

    def to_dense(self):
        base = jax.lax.stop_gradient(to_dense(self.base))
        return _rotate_rows(self.rotations(), base.astype(jnp.float32)).astype(base.dtype)

    def rotations(self) -> jax.Array:
        """R, [n, block, block] float32."""
        q = self._generators()
        if self.terms is None:
            return _cayley(q)
        # I + 2 Q + ... + 2 Q^(last - 1) + Q^last
        last = max(3, self.terms - 1) if self.terms > 2 else 1
        power, total = q, jnp.eye(self.block)[None] + 2 * q
        for exponent in range(2, last + 1):
            power = power @ q
            total = total + (power if exponent == last else 2 * power)
        return total

    def with_specs(self, spec):
        stack, *_ = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        return dataclasses.replace(self, base=base, skew=PartitionSpec(*stack, None, None))

    def _generators(self):
        rows, columns = np.triu_indices(self.block, 1)
        upper = jnp.zeros((len(self.skew), self.block, self.block), jnp.float32)
        upper = upper.at[:, rows, columns].set(self.skew.astype(jnp.float32))
        q = upper - jnp.swapaxes(upper, -1, -2)
        if self.eps is None:
            return q
        radius = self.eps * len(self.skew) ** -0.5
        constant = jax.lax.stop_gradient(q)
        norm = jnp.sqrt(jnp.sum(constant**2, axis=(1, 2), keepdims=True))
        inside = constant * jnp.where(norm <= radius, 1.0, radius / jnp.maximum(norm, radius))
        return q + (inside - constant)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoftWeight(Weight):
    """B_M ... B_1 W diag(s): each B rotates blocks of inputs, with different blocks in each factor.

    BOFT: Liu et al., 2024, arxiv.org/abs/2311.06243, section 4, with PEFT's parameters: R is the Cayley
    transform of the skew-symmetric part of each block, and outputs are scaled by s. Factor m, from 0, rotates
    pairs of half-blocks that lie 2^m half-blocks apart.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    blocks: jax.Array  # [M, D / block, block, block], zeros at first
    scale: jax.Array  # s [F], ones at first

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def rmatmul(self, x):
        rotations = self.rotations()
        for level in reversed(range(len(rotations))):
            x = _factor(x, rotations[level], level)
        y = frozen_matmul(x, self.base)
        return y * along_last(self.scale, y).astype(x.dtype)

    def to_dense(self):
        base = jax.lax.stop_gradient(to_dense(self.base))
        dense = base.astype(jnp.float32)
        for level, rotations in enumerate(self.rotations()):
            # R w for a column w is the row w R^T.
            dense = _factor(dense.T, jnp.swapaxes(rotations, -1, -2), level).T
        return (dense * self.scale[None]).astype(base.dtype)

    def rotations(self) -> jax.Array:
        """The Cayley transforms, [M, D / block, block, block] float32."""
        blocks = self.blocks.astype(jnp.float32)
        return _cayley((blocks - jnp.swapaxes(blocks, -1, -2)) / 2)

    def with_specs(self, spec):
        stack, _, columns = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        return BoftWeight(
            base, PartitionSpec(*stack, None, None, None, None), PartitionSpec(*stack, columns)
        )


def oft_weight(
    key: jax.Array,
    kernel: WeightLike,
    *,
    block_size: int = 32,
    terms: int | None = 5,
    eps: float | None = None,
    share: bool = False,
) -> OftWeight:
    """An OftWeight that equals `kernel` [D, F].

    Args:
        key: unused; all values are initially zero.
        kernel: the kernel.
        block_size: inputs of a rotation; if it does not divide D, the nearest divisor.
        terms: of the Neumann series (PEFT's default is 5); None: the exact Cayley transform.
        eps: radius of COFT; None: unconstrained rotations. PEFT's default is 6e-5.
        share: whether all blocks share one rotation.

    Raises:
        ValueError: for a kernel that is not a matrix, blocks or terms below 2, or if the nearest divisor is
            1, because single inputs cannot rotate.
    """
    del key
    if len(kernel.shape) != 2 or block_size < 2:
        raise ValueError(
            "oft: needs a matrix [in, out] and a block_size of at least 2, got a weight of shape "
            f"{kernel.shape} and block_size {block_size}."
        )
    if terms is not None and terms < 2:
        raise ValueError(f"oft: terms must be at least 2, or None for no series, got {terms}.")
    inputs = kernel.shape[0]
    block = nearest_divisor(inputs, block_size)
    if block < 2:
        raise ValueError(
            f"oft: block_size {block_size} is nearest to blocks of one of the {inputs} inputs, which "
            f"cannot turn; choose a divisor of {inputs}."
        )
    count = 1 if share else inputs // block
    skew = jnp.zeros((count, block * (block - 1) // 2), jnp.float32)
    return OftWeight(kernel, skew, block, terms, eps)


def boft_weight(
    key: jax.Array, kernel: WeightLike, *, block_size: int = 4, factors: int = 1
) -> BoftWeight:
    """A BoftWeight that equals `kernel` [D, F].

    Args:
        key: unused; all values are initially zero, or one.
        kernel: the kernel.
        block_size: inputs of a rotation; must divide D.
        factors: M; 1 is a block-diagonal rotation.

    Raises:
        ValueError: for a kernel that is not a matrix, or if block_size 2^(M - 1) does not divide D.
    """
    del key
    if len(kernel.shape) != 2 or block_size < 2 or factors < 1:
        raise ValueError(
            "boft: needs a matrix [in, out], a block_size of at least 2 and at least one factor, got a "
            f"weight of shape {kernel.shape}, block_size {block_size} and {factors} factors."
        )
    inputs, outputs = kernel.shape
    if problem := butterfly_problem(inputs, block_size, factors):
        raise ValueError(f"boft: {problem}.")
    blocks = jnp.zeros((factors, inputs // block_size, block_size, block_size), jnp.float32)
    return BoftWeight(kernel, blocks, jnp.ones(outputs, jnp.float32))


def butterfly_problem(inputs: int, block_size: int, factors: int) -> str | None:
    """The reason why `inputs` cannot have such butterfly factors, or None if they can."""
    stretch = block_size << (factors - 1)
    if factors == 1 and inputs % stretch:
        return f"block_size {block_size} does not divide {inputs} inputs"
    if inputs % stretch:
        return (
            f"{factors} factors of block_size {block_size} need a multiple of {stretch} inputs, got "
            f"{inputs}"
        )
    if factors > 1 and block_size % 2:
        return f"more than one factor needs an even block_size, got {block_size}"
    return None


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller one of a tie: PEFT's rule for OFT."""
    if wanted >= size:
        return size
    higher = next(n for n in range(wanted, size + 1) if size % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if size % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _cayley(q: jax.Array) -> jax.Array:
    """(I - Q) (I + Q)⁻¹ of matrices [..., b, b]."""
    eye = jnp.eye(q.shape[-1])
    eye = eye.reshape((1,) * (q.ndim - 2) + eye.shape)
    # The factors commute. I + Q has no zero eigenvalue: those of Q are imaginary.
    return jnp.linalg.solve(eye + q, eye - q)


def _rotate(x: jax.Array, rotations: jax.Array) -> jax.Array:
    """x diag(R_1, ..., R_n) for x [..., D] and R [n, b, b], or [1, b, b] for all blocks."""
    parts = x.reshape(*x.shape[:-1], -1, rotations.shape[-1])
    rotations = rotations.astype(x.dtype)
    if len(rotations) == 1:
        return (parts @ rotations[0]).reshape(x.shape)
    return jnp.einsum("...nk,nkc->...nc", parts, rotations).reshape(x.shape)


def _rotate_rows(rotations: jax.Array, kernel: jax.Array) -> jax.Array:
    """diag(R_1, ..., R_n) W for W [D, F]."""
    return _rotate(kernel.T, jnp.swapaxes(rotations, -1, -2)).T


def _factor(x: jax.Array, rotations: jax.Array, level: int) -> jax.Array:
    """x P diag(R_1, ..., R_n) P^T for x [..., D], P the order of the half-blocks at a level."""
    if level == 0:
        return _rotate(x, rotations)
    # PEFT's permutation: half-block h of a stretch of 2^(level + 1) is put beside h + 2^level.
    halves = (*x.shape[:-1], -1, 2, 1 << level, rotations.shape[-1] // 2)
    paired = jnp.swapaxes(x.reshape(halves), -3, -2)
    turned = _rotate(paired.reshape(x.shape), rotations).reshape(paired.shape)
    return jnp.swapaxes(turned, -3, -2).reshape(x.shape)
