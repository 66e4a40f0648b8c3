"""Elastic weight consolidation: a penalty that holds the params that earlier tasks needed.

Kirkpatrick et al., 2017, arxiv.org/abs/1612.00796, equation 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.adapters import combine, partition
from jaxft.metrics import Mean, Terms, terms_of
from jaxft.objectives.next_token import Objective
from jaxft.optim.perturbations import wide


def fisher_diagonal(
    objective: Objective, params: Any, batches: Iterable[Any], key: jax.Array
) -> Any:
    """Returns the mean over rows of the squared gradient of the loss of one row, by trained param.

    This is the empirical Fisher information's diagonal where the loss of a row is its negative
    log-likelihood; `supervised` takes the mean over the row's tokens.

    Args:
        objective: function of (params, batch, key) -> (loss, metrics).
        params: where the gradients are taken; frozen params have none.
        batches: some batches, arrays [B, ...]; all rows count alike.
        key: key of the objective, the same for all rows.

    Raises:
        ValueError: without batches.
    """
    trained, frozen = partition(params)

    def squared(row):
        row = jax.tree.map(lambda x: x[None], row)
        grads = jax.grad(lambda t: objective(combine(t, frozen), row, key)[0])(trained)
        return jax.tree.map(lambda g: jnp.square(wide(g)), grads)

    @jax.jit
    def added(total, batch):
        rows = lambda total, row: (jax.tree.map(jnp.add, total, squared(row)), None)
        return jax.lax.scan(rows, total, batch)[0]

    total, count = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), trained), 0
    for batch in batches:
        total = added(total, batch)
        count += len(jax.tree.leaves(batch)[0])
    if not count:
        raise ValueError("fisher_diagonal: needs at least one batch.")
    return jax.tree.map(lambda x: x / count, total)


def consolidated(objective: Objective, anchor: Any, importance: Any, weight: float) -> Objective:
    """Returns loss + weight / 2 · Σ_i F_i (θ_i - θ*_i)², over trained params.

    Metrics: those of the objective, and `penalty`, the second term.

    Args:
        objective: function of (params, batch, key) -> (loss, metrics).
        anchor: θ*, the params after the earlier tasks, a tree like the params.
        importance: F, of `fisher_diagonal`; the sum of several for several earlier tasks.
        weight: at least 0.

    Raises:
        ValueError: for a weight that is negative or not finite; when called, for trees that differ from
            the params.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"consolidated: weight must be finite and at least 0, got {weight}.")
    center = partition(anchor)[0]

    @functools.wraps(objective)
    def whole(params, batch, key):
        trained = partition(params)[0]
        if (
            not jax.tree.structure(trained)
            == jax.tree.structure(center)
            == jax.tree.structure(importance)
        ):
            raise ValueError(
                "consolidated: anchor and importance must be trees like the trained params."
            )
        loss, metrics = objective(params, batch, key)
        term = lambda p, c, f: jnp.sum(f * jnp.square(wide(p) - wide(c)))
        parts = jax.tree.leaves(jax.tree.map(term, trained, center, importance))
        penalty = 0.5 * weight * sum(parts, jnp.zeros((), jnp.float32))
        terms = Terms((*terms_of(loss, metrics["loss"]), Mean(penalty, jnp.ones(()))))
        held = {"loss": terms, "penalty": jax.lax.stop_gradient(Mean(penalty, jnp.ones(())))}
        return terms.value, metrics | held

    return whole
