"""Gradient estimators that learn to learn: Reptile, MAML and MLDG, over any pytree of params.

Each has the signature of jax.value_and_grad and takes the rows of one task or domain in two or more parts.
`in_groups` gives the mean over tasks, whose rows alternate in the batch (row r is of task r mod n):

    gradient = in_groups(maml(1e-3), 4)                      # 4 tasks a step
    fit(params, objective, optax.adam(1e-3), batches, gradient=gradient)

Parts alternate too: row r of a task is in part r mod 2 (for Reptile r mod steps). `split` takes other forms,
such as a batch of two batches: maml(1e-3, split=lambda batch: (batch["support"], batch["query"])). Every
evaluation gets the other arguments of the objective, its key among them, unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxft.optim.estimators import Estimator, evaluates
from jaxft.optim.perturbations import wide
from jaxft.optim.sharpness import check_steps, in_parts

# batch -> (support or training part, query or test part)
Split = Callable[[Any], tuple[Any, Any]]


def alternate_rows(batch: Any) -> tuple[Any, Any]:
    """(rows 0, 2, 4, ..., rows 1, 3, 5, ...) of all leaves; leaves without axes are in both parts."""
    halves = in_parts(batch, 2)
    return tuple(jax.tree.map(lambda x, i=i: x[i], halves) for i in range(2))


def reptile(
    inner: optax.GradientTransformation,
    steps: int = 5,
    gradient: Estimator = jax.value_and_grad,
) -> Estimator:
    """φ - U^k(φ), U^k = k steps of `inner` on the parts of the batch; value and aux of the first step.

    Reptile: Nichol et al., 2018, arxiv.org/abs/1803.02999, algorithm 2. With optax.sgd(ε) as the optimizer
    and n tasks in groups, the update is theirs: φ + ε/n Σ_i (U_i^k(φ) - φ). With k = 1 and inner SGD of
    rate a the result is a ∇L.

    Args:
        inner: the optimizer of the steps, with its learning rate; its state starts anew in each call.
        steps: k; row r of the batch is used in step r mod k.
        gradient: the estimator of each step.

    Raises:
        ValueError: for steps < 1, and if the rows cannot be split evenly.
    """
    check_steps("reptile", steps=steps)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        estimate = gradient(fun, has_aux=has_aux)

        def value_and_grad(params, batch, *rest):
            def step(carry, part):
                point, state = carry
                value, grads = estimate(point, part, *rest)
                updates, state = inner.update(grads, state, point)
                return (optax.apply_updates(point, updates), state), value

            start = params, inner.init(params)
            (end, _), values = jax.lax.scan(step, start, in_parts(batch, steps))
            gap = lambda a, b: (wide(a) - wide(b)).astype(a.dtype)
            return jax.tree.map(lambda v: v[0], values), jax.tree.map(gap, params, end)

        return value_and_grad

    return estimator


def maml(
    rate: float | jax.Array,
    steps: int = 1,
    *,
    first_order: bool = False,
    split: Split = alternate_rows,
) -> Estimator:
    """∇_φ L_query(φ'), φ' = φ after `steps` of gradient descent on L_support; value and aux at φ'.

    MAML: Finn et al., 2017, arxiv.org/abs/1703.03400, algorithm 1. First-order MAML (their section 5.2)
    is ∇L_query at φ', without second derivatives. With rate 0 both are the gradient on the query rows.

    Args:
        rate: a, learning rate of the inner steps, all on the same support rows.
        split: (support, query) of a batch.

    Raises:
        ValueError: for steps < 1.
    """
    check_steps("maml", steps=steps)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        def value_and_grad(params, batch, *rest):
            support, query = split(batch)

            def adapted(params):
                for _ in range(steps):
                    params = _descended(fun, has_aux, first_order, rate, params, support, *rest)
                return fun(params, query, *rest)

            return jax.value_and_grad(adapted, has_aux=has_aux)(params)

        return value_and_grad

    return estimator


def mldg(
    rate: float | jax.Array,
    beta: float | jax.Array = 1.0,
    *,
    first_order: bool = False,
    split: Split = alternate_rows,
) -> Estimator:
    """∇_φ [L_S(φ) + β L_V(φ - a ∇L_S(φ))]: a step on the domains S shall also help on the domains V.

    Meta-learning for domain generalisation: Li et al., 2018, arxiv.org/abs/1710.03463, algorithm 1 (γ is
    their outer rate, the optimizer's). The value is that of the sum, aux that of L_S. With β = 0 it is the
    gradient on S.

    Args:
        rate: a, learning rate of the inner step.
        beta: β, weight of the meta-test loss.
        first_order: leaves out second derivatives.
        split: (S, V) of a batch. The domains of both should change from batch to batch.
    """

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        def value_and_grad(params, batch, *rest):
            training, test = split(batch)

            def both(params):
                first = fun(params, training, *rest)
                point = _descended(fun, has_aux, first_order, rate, params, training, *rest)
                second = fun(point, test, *rest)
                if not has_aux:
                    return first + beta * second
                return first[0] + beta * second[0], first[1]

            return jax.value_and_grad(both, has_aux=has_aux)(params)

        return value_and_grad

    return estimator


def _descended(fun, has_aux, first_order, rate, params, *args):
    """params - rate ∇fun(params), through which gradients flow; in first order through `params` only."""
    grads = jax.grad(fun, has_aux=has_aux)(params, *args)
    grads = grads[0] if has_aux else grads
    if first_order:
        grads = jax.lax.stop_gradient(grads)
    step = lambda p, g: (wide(p) - rate * wide(g)).astype(p.dtype)
    return jax.tree.map(step, params, grads)
