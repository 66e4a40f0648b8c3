"""Stochastic rounding of params, as the last transform of any optax chain."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.kernels.counter_bits import counter_bits, seeds
from jaxft.kernels.rounding import stochastic_round

MOMENT_STREAM, PARAM_STREAM = 0, 1


class RoundingState(NamedTuple):
    """The state of `round_stochastically`."""

    count: jax.Array  # [] int32, steps done; determines the random bits together with the key


def round_stochastically(key: jax.Array | None = None) -> optax.GradientTransformation:
    """Updates u that move bfloat16 params θ to bfloat16 numbers whose mean is θ plus the given update.

    Rounding to nearest would lose updates below half a unit in θ's last place (θ / 512).
    optax.apply_updates gives exactly the rounded params, so this transform must be the last. The
    updates keep their data type. Also in bfloat16 they are exact while θ keeps its sign and changes
    by less than a half; a larger step is rounded to nearest, by at most 1 / 512 of itself. Params
    of other types, and their updates, do not change. `key` defaults to jax.random.key(0).
    """

    def init(params):
        del params
        return RoundingState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "round_stochastically: params=None; call update(updates, state, params)."
            )
        leaves, treedef = jax.tree.flatten(updates)
        draws = step_seeds(key, len(leaves), PARAM_STREAM, state.count)
        rounded = map(_rounded, leaves, treedef.flatten_up_to(params), draws)
        return treedef.unflatten(list(rounded)), RoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def step_seeds(key: jax.Array | None, number: int, stream: int, count: jax.Array) -> jax.Array:
    """uint32 [number, 2]: the seeds of all leaves for one purpose at one step."""
    return seeds(jax.random.key(0) if key is None else key, number, stream, count)


def _rounded(update, param, seed):
    if param.dtype != jnp.bfloat16:
        return update
    p = param.astype(jnp.float32)
    new = stochastic_round(p + update.astype(jnp.float32), counter_bits(seed, p.shape))
    # Where this difference of two bfloat16 numbers is inexact, p is too small to matter in p + u.
    return (new.astype(jnp.float32) - p).astype(update.dtype)
