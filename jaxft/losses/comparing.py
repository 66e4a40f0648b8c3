"""Detects losses of pairs that compare the pairs of a batch with each other."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxft.losses.preference import Pairs


def compares_pairs(loss: Callable[[Pairs], jax.Array]) -> bool:
    """True if a pair's value depends on other pairs of its batch, so that microbatches would change it.

    jaxft's losses have an attribute of this name, which is also found inside a functools.partial.
    Any other function is evaluated on a few pairs, which are changed one at a time. If that fails
    (a hyperparameter is traced, or has a number for each pair), the function counts as comparing
    pairs, unless it has the attribute: `mine.compares_pairs = False`.
    """
    inner = loss
    while not hasattr(inner, "compares_pairs"):
        if isinstance(inner, functools.partial):
            inner = inner.func
        elif hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        else:
            ours = str(getattr(inner, "__module__", None)).startswith(f"{__package__}.")
            return False if ours else _seen_to_compare(loss)
    return inner.compares_pairs


def _seen_to_compare(loss, size=4):
    """True if any of `size` values changes when another pair changes, or if `loss` cannot be evaluated."""
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.uniform(low, high, (1 + 2 * size, size)).astype(np.float32)
    log_probs, tokens = lambda: draw(-40, -1), lambda: np.round(draw(1, 30))
    columns = [*(log_probs() for _ in range(4)), tokens(), tokens(), log_probs(), tokens()]
    columns.append(np.round(draw(0, 1)))  # whether it counts
    columns[-1][0] = 1
    # The first row has the original pairs; every other row differs from it in one pair.
    moved = np.concatenate([np.zeros((1, size), bool), *[np.eye(size, dtype=bool)] * 2])
    columns = [np.where(moved, column, column[:1]) for column in columns]
    try:
        with jax.ensure_compile_time_eval():
            values = np.asarray(jax.jit(jax.vmap(loss))(Pairs(*columns)))
        others = np.where(moved, values[:1], values)
    except Exception:  # the function may raise anything
        return True
    return not np.allclose(others, values[:1], rtol=1e-5, atol=1e-6, equal_nan=True)
