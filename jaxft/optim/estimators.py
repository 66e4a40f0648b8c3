"""Marks where a gradient estimator evaluates its objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# estimator(fun, has_aux)(params, *args) -> (value, grads), as jax.value_and_grad.
Estimator = Callable[..., Callable[..., Any]]


def evaluates(*, at_params: bool) -> Callable[[Estimator], Estimator]:
    """Returns a decorator that records where a gradient estimator evaluates its objective.

    A weight may have a cheaper form that is correct only at the params of the train state: PaCA's
    multiplies by the kernel that holds the trained rows. `jaxft.train.make_step` uses that form
    only with estimators marked at_params=True; at other params its values are wrong. For example:

        @evaluates(at_params=True)
        def clipped(fun, has_aux):
            return clip(jax.value_and_grad(fun, has_aux=has_aux))

    Args:
        at_params: True if it evaluates only at the params that it is given; False if also at
            others, as `sam`.
    """

    def say(estimator):
        @functools.wraps(estimator)
        def same(*args, **options):
            return estimator(*args, **options)

        same.evaluates_at_params = at_params
        return same

    return say


def evaluates_at_params(estimator: Estimator) -> bool | None:
    """The mark set by `evaluates`, also inside functools.partial; None if there is none."""
    while isinstance(estimator, functools.partial):
        estimator = estimator.func
    # JAX's own function carries no mark.
    known = True if estimator is jax.value_and_grad else None
    return getattr(estimator, "evaluates_at_params", known)
