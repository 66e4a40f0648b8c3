"""What a gradient estimator says of itself: where it evaluates its objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# estimator(fun, has_aux)(params, *args) -> (value, grads), as of jax.value_and_grad.
Estimator = Callable[..., Callable[..., Any]]


def evaluates(*, at_params: bool) -> Callable[[Estimator], Estimator]:
    """Decorates a gradient estimator with where it evaluates its objective.

    A weight may have a form that costs less and is right at the params of the train state alone: PaCA's
    multiplies by the kernel that holds the trained rows. `jaxft.train.make_step` uses it with estimators that
    say at_params=True, and not with others. Elsewhere that form has the wrong values. For example:

        @evaluates(at_params=True)
        def clipped(fun, has_aux):
            return clip(jax.value_and_grad(fun, has_aux=has_aux))

    Args:
        at_params: True: at the params that it is given and at no others; False: also at others, as `sam`.
    """

    def say(estimator):
        @functools.wraps(estimator)
        def same(*args, **options):
            return estimator(*args, **options)

        same.evaluates_at_params = at_params
        return same

    return say


def evaluates_at_params(estimator: Estimator) -> bool | None:
    """What the estimator says by `evaluates`, itself or inside functools.partial; None if it says nothing."""
    while isinstance(estimator, functools.partial):
        estimator = estimator.func
    # JAX's own function cannot say it, so it is said here.
    known = True if estimator is jax.value_and_grad else None
    return getattr(estimator, "evaluates_at_params", known)
