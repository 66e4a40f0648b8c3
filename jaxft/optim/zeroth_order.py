"""Gradients estimated from loss values: estimators with the signature of jax.value_and_grad.

    ((loss, metrics), grads) = spsa()(objective, has_aux=True)(params, batch, key)

The last argument of the objective is a key. All evaluations of one estimate get the same arguments, key
included (common random numbers: two losses differ only through the params), and the directions are
drawn from another key, derived from it. Directions are regenerated where they are needed and never
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.keys import stream
from jaxft.optim.directions import Direction, along, normal, rademacher, size, widest
from jaxft.optim.estimators import Estimator, evaluates
from jaxft.optim.perturbations import wide


def rge(
    mu: float = 1e-3,
    samples: int = 1,
    *,
    two_sided: bool = False,
    direction: Direction = normal,
) -> Estimator:
    """1/n Σ_i (L(θ + μ e_i) - L(θ)) / μ e_i, or two-sided, (L(θ + μ e_i) - L(θ - μ e_i)) / 2μ e_i.

    Randomised gradient estimation: Nesterov & Spokoiny, 2017, doi.org/10.1007/s10208-015-9296-2, eqs. 22-24;
    one-sided with n = 2 and normal e as in ZOODiP (Seo et al., 2025, arxiv.org/abs/2503.14868). Its mean is
    the gradient of E_e[L(θ + μ e)]: exact for a linear L, and two-sided for a quadratic one. For linear L
    and normal e, E|g|² = (d + n + 1) / n |∇L|² (rademacher: (d + n - 1) / n): learning rates must
    be smaller than first-order ones by a factor of order n / d.

    The returned loss and metrics are those at θ or, if two-sided, means over the evaluations.

    Args:
        mu: μ, the size of the step. It is lost in params of coarser precision: keep trained params
            in float32, and return the loss in float32.
        samples: n. There are n + 1 evaluations, two-sided 2 n.
        direction: (key, params) -> e with E[e e^T] = I: `normal`, `rademacher`, `sphere` or your own.

    Raises:
        ValueError: for mu <= 0 or samples < 1; when traced, for a loss that is not a scalar or a
            last argument that is not a key.
    """
    _check(mu, samples)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        def value_and_grad(params, *args):
            keys = jax.random.split(direction_key(args), samples)
            first = 0 if two_sided else 1
            sides = [mu, -mu] if two_sided else [mu]
            steps = jnp.array([0.0] * first + sides * samples, widest(params))
            which = jnp.concatenate(
                [jnp.zeros(first, int), jnp.repeat(jnp.arange(samples), len(sides))]
            )

            def evaluate(_, step_and_index):
                step, index = step_and_index
                return None, evaluation(
                    fun, along(params, keys[index], step, direction), args, has_aux
                )

            # A loop compiles the objective once and keeps one moved copy of the params in memory.
            _, (losses, aux) = jax.lax.scan(evaluate, None, (steps, which))
            if two_sided:
                pairs = losses.reshape(samples, 2)
                slopes = (pairs[:, 0] - pairs[:, 1]) / (2 * mu)
                loss, aux = jnp.mean(losses), jax.tree.map(_mean, aux)
            else:
                slopes = (losses[1:] - losses[0]) / mu
                loss, aux = losses[0], jax.tree.map(lambda a: a[0], aux)
            grads = from_slopes(params, keys, slopes, direction)
            return ((loss, aux) if has_aux else loss), grads

        return value_and_grad

    return estimator


def spsa(mu: float = 1e-3, samples: int = 1) -> Estimator:
    """1/n Σ_i (L(θ + μ e_i) - L(θ - μ e_i)) / 2μ e_i with e_i of ±1.

    Simultaneous perturbation stochastic approximation: Spall, 1992, doi.org/10.1109/9.119632, eq. 2.2. See
    `rge`.
    """
    return rge(mu, samples, two_sided=True, direction=rademacher)


def coordinate_differences(mu: float = 1e-3) -> Estimator:
    """(L(θ + μ u_j) - L(θ - μ u_j)) / 2μ for each coordinate j: exact up to μ², in 2 d evaluations.

    An oracle for the other estimators, or a method for a few params. Arguments, values and errors
    as for `rge`.
    """
    _check(mu, 1)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        def value_and_grad(params, *args):
            direction_key(args)
            leaves, treedef = jax.tree.flatten(params)

            def moved(index, step):
                out, start = [], 0
                for leaf in leaves:
                    flat = (
                        leaf.reshape(-1)
                        .at[index - start]
                        .add(
                            jnp.where((index >= start) & (index < start + leaf.size), step, 0.0),
                            mode="drop",
                        )
                    )
                    out.append(flat.reshape(leaf.shape))
                    start += leaf.size
                return treedef.unflatten(out)

            def slope(_, index):
                plus, _ = evaluation(fun, moved(index, mu), args, has_aux)
                minus, _ = evaluation(fun, moved(index, -mu), args, has_aux)
                return None, (plus - minus) / (2 * mu)

            _, slopes = jax.lax.scan(slope, None, jnp.arange(size(params)))
            grads, start = [], 0
            for leaf in leaves:
                part = slopes[start : start + leaf.size].reshape(leaf.shape)
                grads.append(part.astype(leaf.dtype))
                start += leaf.size
            loss, aux = evaluation(fun, params, args, has_aux)
            return ((loss, aux) if has_aux else loss), treedef.unflatten(grads)

        return value_and_grad

    return estimator


def from_slopes(params: Any, keys: jax.Array, slopes: jax.Array, direction: Direction) -> Any:
    """1/n Σ_i slopes[i] e_i in the params' data types, e_i drawn again from keys[i]."""

    def add(total, key_and_slope):
        key, slope = key_and_slope
        e = direction(key, params)
        add = lambda t, x: (t + slope / len(slopes) * x).astype(t.dtype)
        return jax.tree.map(add, total, e), None

    zeros = jax.tree.map(lambda p: wide(jnp.zeros_like(p)), params)
    total, _ = jax.lax.scan(add, zeros, (keys, slopes))
    return jax.tree.map(lambda t, p: t.astype(p.dtype), total, params)


def direction_key(args: tuple[Any, ...]) -> jax.Array:
    """The key of the directions, from the objective's last argument."""
    key = args[-1] if args else None
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(
            f"zeroth order: the last argument must be a key, got {type(key).__name__}; call it as "
            "(params, batch, key) with key = jax.random.key(seed)."
        )
    return stream(key, "directions")


def evaluation(fun: Callable, params: Any, args: tuple[Any, ...], has_aux: bool):
    """(loss in float32 or wider, aux), aux None if there is none."""
    loss, aux = fun(params, *args) if has_aux else (fun(params, *args), None)
    if jnp.shape(loss) != ():
        raise ValueError(
            f"zeroth order: the loss must be a scalar, got shape {jnp.shape(loss)}; take its mean."
        )
    return wide(loss), aux


def _mean(values):
    return jnp.mean(values, axis=0).astype(values.dtype)


def _check(mu, samples):
    if not mu > 0 or samples < 1:
        raise ValueError(
            f"zeroth order: needs mu > 0 and samples >= 1, got mu={mu} and samples={samples}."
        )
