"""The k largest entries without a sort of all."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int


def largest(x: Float[Array, "*B N"], k: int) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """(values, indices) of the k largest entries, the largest first, of equal ones the first.

    `jax.lax.top_k`, whose results may be sliced. XLA:CPU recognises top_k by its slices of a sorted array;
    it merges slices of the results with them, no longer recognises it, and sorts the whole vocabulary.
    """
    values, indices = jax.lax.top_k(x, k)
    # One for each: XLA ends the process for a barrier of both if x is sharded over devices.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)
