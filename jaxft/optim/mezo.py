"""MeZO: training with the memory of inference, and replay from a few bytes per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.optim.directions import Direction, along, normal, widest
from jaxft.optim.zeroth_order import direction_key, evaluation


class MezoRecord(NamedTuple):
    """The record of one step: θ became θ - scale e(key)."""

    key: jax.Array  # of the direction
    scale: (
        jax.Array
    )  # [] float32 or wider, learning rate times projected gradient; 0 if that was not finite


def mezo_step(
    fun: Callable, mu: float = 1e-3, *, has_aux: bool = False, direction: Direction = normal
) -> Callable[..., tuple[Any, Any, MezoRecord]]:
    """step(params, learning_rate, *args, key) -> (params, value, record): θ - η (L(θ+μe) - L(θ-μe)) / 2μ e.

    MeZO: Malladi et al., 2023, arxiv.org/abs/2305.17333, algorithm 1. One set of params is moved to θ + μe,
    to θ - μe and to the result, each time in place, with e regenerated from the key: jitted with
    donate_argnums=0, the step needs only the memory of `fun`. The rounding errors of these moves
    stay in the params, about one unit in the last place per step. `value` is the mean of both
    losses, or (loss, aux) with the mean of both aux.

    rge(mu, two_sided=True) gives this gradient to any optimizer; it needs memory for a copy
    of the params and for the gradient.

    Raises:
        ValueError: as for jaxft.optim.rge.
    """
    if not mu > 0:
        raise ValueError(f"mezo_step: mu must be positive, got {mu}.")

    def step(params, learning_rate, *args):
        key = direction_key(args)

        def evaluate(params, shift):
            # The barrier stops the compiler from drawing e once, before the loop, and storing it.
            params, again = jax.lax.optimization_barrier((params, key))
            params = along(params, again, shift, direction)
            return params, evaluation(fun, params, args, has_aux)

        # XLA updates the carry of a loop in place; without a loop it might keep both sides.
        shifts = jnp.array([mu, -2 * mu], widest(params))
        params, (losses, aux) = jax.lax.scan(evaluate, params, shifts)
        scale = learning_rate * (losses[0] - losses[1]) / (2 * mu)
        scale = jnp.where(jnp.isfinite(scale), scale, 0.0)
        params = along(params, key, mu - scale, direction)
        aux = jax.tree.map(lambda a: jnp.mean(a, axis=0).astype(a.dtype), aux)
        loss = jnp.mean(losses)
        return params, ((loss, aux) if has_aux else loss), MezoRecord(key, scale)

    return step


def mezo_replay(params: Any, records: MezoRecord, *, direction: Direction = normal) -> Any:
    """The params after the steps of `records` (stacked on axis 0), without data or losses.

    Equal to training up to the rounding errors of its moves.
    """

    def step(params, record):
        return along(params, record.key, -record.scale, direction), None

    return jax.lax.scan(step, params, records)[0]
