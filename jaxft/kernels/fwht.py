"""The Walsh-Hadamard transform."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# Products with H_128 fill a TPU's matrix unit; a CPU's caches and registers favour small factors.
RADIX = {"cpu": 16}
DEFAULT_RADIX = 128


def fwht(
    x: jax.Array,
    axis: int = -1,
    *,
    implementation: str | None = None,
    radix: int | None = None,
) -> jax.Array:
    """H x along one axis of length L = 2^k, H unnormalised: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]].

    H = H_r ⊗ H_r ⊗ ... (Sylvester), so that a transform is log_r L products with H_r on a reshaped
    array: L r log_r L multiplications instead of L². H is symmetric and H H = L I, so autodiff's
    adjoint of a transform is a transform.

    Args:
        x: floats, or integers (for exact sums).
        axis: axis to transform.
        implementation: "butterfly": log2 L passes of additions, the plain form. "matmul": products
            with H_r. None: matmul.
        radix: r, a power of 2; None: 16 on a CPU, else 128.

    Raises:
        ValueError: for a length or radix that is not a power of 2, or an unknown implementation.
    """
    length = x.shape[axis]
    if length < 1 or length & (length - 1):
        raise ValueError(
            f"fwht: axis {axis} of {x.shape} has length {length}, not a power of 2; pad it with zeros."
        )
    if implementation == "butterfly":
        transform = _butterfly
    elif implementation in ("matmul", None):
        radix = radix or RADIX.get(jax.default_backend(), DEFAULT_RADIX)
        if radix < 2 or radix & (radix - 1):
            raise ValueError(f"fwht: radix must be a power of 2, at least 2, got {radix}.")
        transform = lambda x: _products(x, radix)
    else:
        raise ValueError(
            f"fwht: unknown implementation {implementation!r}; expected matmul or butterfly."
        )
    return jnp.moveaxis(transform(jnp.moveaxis(x, axis, -1)), -1, axis)


def hadamard_matrix(order: int) -> np.ndarray:
    """H [order, order] float32 of Sylvester's construction: entry (i, j) is (-1)^popcount(i & j)."""
    i = np.arange(order)
    odd = np.bitwise_count(i[:, None] & i[None]) % 2 == 1
    return np.where(odd, np.float32(-1), np.float32(1))


def _butterfly(x):
    shape, half = x.shape, 1
    while half < shape[-1]:
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(shape)
        half *= 2
    return x


def _products(x, radix):
    shape, half = x.shape, 1
    while half < shape[-1]:
        order = math.gcd(radix, shape[-1] // half)
        h = jnp.asarray(hadamard_matrix(order), x.dtype)
        blocks = x.reshape(*shape[:-1], -1, order, half)
        # A TPU would otherwise round x to bfloat16.
        x = jnp.einsum("ij,...bjh->...bih", h, blocks, precision=jax.lax.Precision.HIGHEST)
        x = x.reshape(shape)
        half *= order
    return x
