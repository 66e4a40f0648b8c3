"""Random directions with E[e e^T] = I, as functions of (key, params): regenerated, never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.counter_bits import counter_bits, seeds, uniform
from jaxft.optim.perturbations import wide

# (key, params) -> a float32 tree like the params.
Direction = Callable[[jax.Array, Any], Any]


def normal(key: jax.Array, params: Any) -> Any:
    """e ~ N(0, I)."""
    return _from_bits(lambda bits: jnp.sqrt(2.0) * jax.lax.erf_inv(2 * uniform(bits) - 1))(
        key, params
    )


def rademacher(key: jax.Array, params: Any) -> Any:
    """e_i = ±1, each with probability 1/2."""
    return _from_bits(lambda bits: 1.0 - 2.0 * (bits >> jnp.uint32(31)).astype(jnp.float32))(
        key, params
    )


def sphere(key: jax.Array, params: Any) -> Any:
    """e uniform on the sphere of radius sqrt(d), d the number of params.

    In the usual form, with unit vectors u = e / sqrt(d), the estimate is d (ΔL / μ') u at μ' =
    sqrt(d) μ.
    """
    e = normal(key, params)
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(e)]
    square = sum(squares, jnp.zeros((), jnp.float32))
    scale = jnp.sqrt(size(params) / square)
    return jax.tree.map(lambda leaf: leaf * scale, e)


def along(params: Any, key: jax.Array, step: jax.Array, direction: Direction) -> Any:
    """θ + step * e, in the params' data types; e is drawn from `key` where it is added."""
    move = lambda p, e: (wide(p) + step * e).astype(p.dtype)
    return jax.tree.map(move, params, direction(key, params))


def size(params: Any) -> int:
    """The number of params."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def widest(params: Any) -> Any:
    """The data type that holds every param, float32 or wider."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))


def _from_bits(convert):
    def direction(key, params):
        leaves, treedef = jax.tree.flatten(params)
        draws = seeds(key, len(leaves))
        made = [
            convert(counter_bits(seed, leaf.shape))
            for seed, leaf in zip(draws, leaves, strict=True)
        ]
        return treedef.unflatten(made)

    return direction
