"""Random linear maps from a few numbers to many, never stored densely: Fastfood."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.kernels.fwht import fwht

ROUNDS = 6  # of the permutation
Overflow = Literal["fold", "crop"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FastfoodMap:
    """P theta = first D entries of H G Pi H B theta / sqrt(D sum(G²)), linear in theta [d].

    Fastfood: Le et al., 2013, proceedings.mlr.press/v28/le13.html, as used by Aghajanyan et al., 2020,
    arxiv.org/abs/2012.13255. H is the unnormalised Walsh-Hadamard transform of length
    L = 2^ceil(log2 D). Columns of P have a squared norm of about 1 and are nearly orthogonal. The
    adjoint from autodiff is exactly P^T; the released code multiplies each H by 1/sqrt(L) in the
    backward pass, which scales the gradient of each tensor by 1/L.
    """

    signs: jax.Array  # B [C, L], ±1 int8; row c for entries c L to (c + 1) L of theta
    permutation: jax.Array  # Pi [L], int32
    gains: jax.Array  # G [L], normal
    size: int = dataclasses.field(metadata={"static": True})  # D

    def __call__(self, theta: jax.Array) -> jax.Array:
        """P theta [D], float32."""
        chunks, length = self.signs.shape
        theta = theta.astype(jnp.float32)[: chunks * length]
        padded = jnp.pad(theta, (0, chunks * length - theta.size)).reshape(chunks, length)
        x = fwht(jnp.sum(padded * self.signs, axis=0))
        x = x.at[self.permutation].get(unique_indices=True, mode="promise_in_bounds")
        x = fwht(x * self.gains)[: self.size]
        return x / jnp.sqrt(self.size * jnp.sum(self.gains**2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseMap:
    """P theta of a matrix P [D, d]."""

    matrix: jax.Array

    def __call__(self, theta: jax.Array) -> jax.Array:
        """P theta [D], float32."""
        return self.matrix @ theta.astype(jnp.float32)


def fastfood(key: jax.Array, d: int, D: int, *, overflow: Overflow = "fold") -> FastfoodMap:
    """A random Fastfood map from d to D numbers: a function, and a pytree of its random parts.

    To draw the parts inside the program, call it in jit with the key as an argument; or draw the map
    once and pass it as an argument. Never close over it: XLA would spend minutes folding its parts as
    constants. Maps of one key agree: the map for d equals the map for a larger d on the first d
    numbers (for "crop", if d <= L).

    Args:
        key: a jax.random.key.
        d: numbers in.
        D: numbers out.
        overflow: the rule for d > L. "fold": each chunk of L numbers gets its own signs, and the
            chunks are added. "crop": only the first L count, as in the released code.

    Raises:
        ValueError: if d < 1, D < 1, or overflow is unknown.
    """
    _check_sizes("fastfood", d, D)
    if overflow not in ("fold", "crop"):
        raise ValueError(f"fastfood: unknown overflow {overflow!r}; expected fold or crop.")
    length = 1 << (D - 1).bit_length()
    chunks = math.ceil(d / length) if overflow == "fold" else 1
    keys = jax.random.split(key, 3)
    return FastfoodMap(
        signs=jax.random.rademacher(keys[0], (chunks, length), jnp.int8),
        permutation=_permutation(keys[1], length),
        gains=jax.random.normal(keys[2], (length,)),
        size=D,
    )


def cropped_fastfood(key: jax.Array, d: int, D: int) -> FastfoodMap:
    """`fastfood` with overflow="crop", as a function with a name."""
    return fastfood(key, d, D, overflow="crop")


def dense_projection(key: jax.Array, d: int, D: int) -> DenseMap:
    """A random map of entries N(0, 1/D), columns of about unit norm; it stores D d numbers.

    Li et al., 2018, arxiv.org/abs/1804.08838, draw N(0, 1) and normalise each column.

    Raises:
        ValueError: if d < 1 or D < 1.
    """
    _check_sizes("dense_projection", d, D)
    return DenseMap(jax.random.normal(key, (D, d)) / jnp.sqrt(D))


def _permutation(key, length):
    """A pseudorandom permutation of `length` = 2^k numbers in O(length), whereas shuffling sorts.

    Each round is a bijection of k-bit numbers: add a constant, multiply by an odd number, both modulo
    2^k, and xor the upper half of the bits into the lower, as in MurmurHash3's finalizer.
    """
    bits = length.bit_length() - 1
    i = jnp.arange(length, dtype=jnp.uint32)
    for add, factor in jax.random.bits(key, (ROUNDS, 2), jnp.uint32):
        i = ((i + add) * (factor | 1)) & jnp.uint32(length - 1)
        i = i ^ (i >> max(1, bits // 2))
    return i.astype(jnp.int32)


def _check_sizes(name, d, size):
    if d < 1 or size < 1:
        raise ValueError(f"{name}: needs d >= 1 and D >= 1, got d = {d} and D = {size}.")
