"""Sharpness-aware gradient estimators: functions with the signature of jax.value_and_grad.

    (loss, metrics), grads = sam(0.05)(objective, has_aux=True)(params, batch, key)

Loss and metrics are those at θ, the gradient is that at θ + eps; no gradient flows through eps. Both
passes get the same arguments, so that an objective draws the same random numbers (dropout) in both.

With microbatches there are two methods, which differ in eps:

    one eps of the whole batch:    sam(0.05, gradient=accumulate(jax.value_and_grad, 4))
    one eps per slice (m-SAM):     accumulate(sam(0.05), 4) or make_step(gradient=sam(), microbatches=4)

The second measures sharpness on fewer rows, which generalised better in Foret et al., section 4.1;
its result depends on the number of slices, unlike that of the first. `m_sam` is the second method
without jaxft.train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.optim.estimators import Estimator, evaluates, evaluates_at_params
from jaxft.optim.perturbations import (
    Perturbation,
    fisher_perturbation,
    moved,
    perturb_asam,
    perturb_fisher,
    perturb_sam,
    wide,
)


def sharpness_aware(
    perturb: Perturbation, gradient: Estimator = jax.value_and_grad, *, ascent_steps: int = 1
) -> Estimator:
    """∇L at θ_n, where θ_0 = θ and θ_{i+1} = θ_i + perturb(θ_i, ∇L(θ_i)); value and aux at θ.

    Sharpness-aware minimisation: Foret et al., 2021, arxiv.org/abs/2010.01412, algorithm 1, with n = 1.
    Costs n + 1 gradients.

    Args:
        perturb: (params, grads) -> eps: `perturb_sam`, `perturb_asam`, `perturb_fisher` or your own.
        gradient: the estimator of both passes.
        ascent_steps: n.

    Raises:
        ValueError: for ascent_steps < 1.
    """
    check_steps("sharpness_aware", ascent_steps=ascent_steps)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        value_and_grad = gradient(fun, has_aux=has_aux)

        def sharp(params, *args):
            value, grads = value_and_grad(params, *args)
            point = params
            for _ in range(ascent_steps):
                point = moved(point, perturb(point, grads))
                _, grads = value_and_grad(point, *args)
            return value, grads

        return sharp

    return estimator


def sam(rho: float | jax.Array = 0.05, gradient: Estimator = jax.value_and_grad) -> Estimator:
    """∇L(θ + ρ g / ‖g‖), g = ∇L(θ): see `sharpness_aware` and `perturb_sam`."""
    return sharpness_aware(perturb_sam(rho), gradient)


def asam(
    rho: float | jax.Array = 0.5,
    gradient: Estimator = jax.value_and_grad,
    *,
    eta: float | jax.Array = 0.0,
) -> Estimator:
    """∇L(θ + ρ T² g / ‖T g‖), T = |θ| + η: see `sharpness_aware` and `perturb_asam`."""
    return sharpness_aware(perturb_asam(rho, eta), gradient)


def fisher_sam(
    gamma: float | jax.Array = 0.1,
    eta: float | jax.Array = 0.1,
    gradient: Estimator = jax.value_and_grad,
) -> Estimator:
    """∇L(θ + γ F⁻¹ g / sqrt(g · F⁻¹ g)): see `sharpness_aware` and `perturb_fisher`."""
    return sharpness_aware(perturb_fisher(gamma, eta), gradient)


def m_sam(
    rho: float | jax.Array = 0.05, m: int = 2, gradient: Estimator = jax.value_and_grad
) -> Estimator:
    """m-SAM: SAM with an eps for each of m groups of rows: `in_groups(sam(rho), m)`."""
    return in_groups(sam(rho, gradient), m)


def in_groups(estimator: Estimator, groups: int) -> Estimator:
    """1/m Σ_i estimator(fun)(params, rows of group i, *rest), m groups: values, aux and gradients.

    m-sharpness: Foret et al., 2021, section 4.1, whose m is the rows of a group, not the groups. The first
    argument after the params, a pytree of arrays with rows on axis 0, is split: row r goes to group r mod
    m, so that rows split over devices stay where they are. All groups get its leaves without axes
    and the other arguments unchanged. Groups have equal weights and aux is averaged leaf by leaf;
    jaxft.train.accumulate weights by tokens and adds Means.

    Raises:
        ValueError: for groups < 1, and if the rows cannot be split evenly.
    """
    check_steps("in_groups", groups=groups)

    def in_all(fun, *, has_aux=False):
        one = estimator(fun, has_aux=has_aux)

        def value_and_grad(params, batch, *rest):
            parts = in_parts(batch, groups)
            run = lambda part: jax.tree.map(jnp.asarray, one(params, part, *rest))
            run = jax.jit(run, inline=True)  # traced once, for its shapes and in the scan
            shapes = jax.eval_shape(run, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda s: wide(jnp.zeros(s.shape, s.dtype)), shapes)
            add = lambda total, x: (jax.tree.map(lambda t, y: t + wide(y), total, run(x)), None)
            total, _ = jax.lax.scan(add, zeros, parts)
            return jax.tree.map(lambda t, s: (t / groups).astype(s.dtype), total, shapes)

        return value_and_grad

    at_params = evaluates_at_params(estimator)
    return in_all if at_params is None else evaluates(at_params=at_params)(in_all)


def tram(
    distance: Callable[..., Any],
    *,
    d_scale: float | jax.Array = 1.0,
    d_max: float | jax.Array = math.inf,
    eta: float | jax.Array = 0.0,
    gradient: Estimator = jax.value_and_grad,
) -> Estimator:
    """∇L(θ + d T² g / ‖T g‖), T = |θ| + η: ASAM whose radius d is a trust-region distance.

    TRAM: Sherborne et al., 2023, arxiv.org/abs/2310.03646, eq. 7 and algorithm 1. d is a number without
    gradient, so that ‖eps / θ‖ = d; where d = 0 this is the plain gradient. The authors' code differs: its
    eps is d θ² / ‖θ g‖, without the gradient, and its KL is divided by the numbers of classes and,
    once more, of rows, which `d_scale` = 1 / (classes · rows) reproduces.

    Use `with_tram` for distances to moving params (the previous step, a running mean), and for
    adapters: jaxft's train step gives an estimator only the trained params and keeps the frozen
    ones in the objective, where a distance does not see them.

    Args:
        distance: (params, *args) -> d, at least 0, of the objective's arguments, with no gradient through
            it; a scalar, or a jaxft.metrics.Mean. See jaxft.objectives: noise_distance, and
            function_distance to fixed params.
        d_scale: multiplies d.
        d_max: the largest radius.
        eta: see `perturb_asam`.
        gradient: the estimator of both passes.

    Raises:
        ValueError: for a negative d_scale, d_max or eta; when traced, for a d that is not a scalar.
    """
    check_radius("tram", d_scale, d_max)
    perturb_asam(0.0, eta)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        def value_and_grad(params, *args):
            d = radius(distance(params, *args), d_scale, d_max)
            inner = sharpness_aware(perturb_asam(d, eta), gradient)
            return inner(fun, has_aux=has_aux)(params, *args)

        return value_and_grad

    return estimator


def tram_fisher(
    noised: Callable[..., Any],
    gamma: float | jax.Array = 0.1,
    eta: float | jax.Array = 0.1,
    gradient: Estimator = jax.value_and_grad,
) -> Estimator:
    """Fisher SAM with f = (∇L(θ; x + z))², the gradient at noised inputs.

    TRAM-Fisher: Sherborne et al., 2023, arxiv.org/abs/2310.03646. Costs three gradients. As in
    `tram`, `noised` gets only the trained params: with adapters, use `with_tram_fisher`.

    Args:
        noised: the objective with noise on its inputs: the same arguments and results. Without noise
            this is `fisher_sam`.
        gamma, eta: see `perturb_fisher`.
        gradient: the estimator of all passes.
    """
    perturb = fisher_perturbation(gamma, eta)

    @evaluates(at_params=False)
    def estimator(fun, *, has_aux=False):
        at_noise = gradient(noised, has_aux=has_aux)

        def value_and_grad(params, *args):
            _, others = at_noise(params, *args)
            inner = sharpness_aware(lambda _, grads: perturb(grads, others), gradient)
            return inner(fun, has_aux=has_aux)(params, *args)

        return value_and_grad

    return estimator


def radius(d: Any, d_scale: float | jax.Array = 1.0, d_max: float | jax.Array = math.inf):
    """min(d_scale · max(d, 0), d_max) in float32 and without gradient."""
    d = scalar(d)
    # A divergence of nearly equal distributions may be rounded below 0.
    return jnp.minimum(d_scale * jnp.maximum(jax.lax.stop_gradient(d), 0.0), d_max)


def scalar(d: Any) -> jax.Array:
    """Returns a distance as an array; accepts a scalar or a Mean."""
    d = jnp.asarray(getattr(d, "value", d))
    if d.shape != ():
        raise ValueError(
            f"a distance must be a scalar, got shape {d.shape}; take a mean over tokens or examples."
        )
    return d.astype(jnp.float32)


def check_radius(name: str, d_scale: Any, d_max: Any) -> None:
    """Raises ValueError for a negative d_scale or d_max, if they are Python numbers."""
    for argument, value in (("d_scale", d_scale), ("d_max", d_max)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}: {argument} must be at least 0, got {value}.")


def check_steps(name: str, least: int = 1, **numbers: int) -> None:
    """Raises ValueError for a number below `least`, unless it is traced (optax.inject_hyperparams)."""
    for argument, value in numbers.items():
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f"{name}: {argument} must be at least {least}, got {value}.")


def in_parts(batch: Any, parts: int) -> Any:
    """Leaves [B, ...] as [parts, B / parts, ...], row r in part r mod `parts`; leaves without axes repeat.

    Raises:
        ValueError: if the rows cannot be split evenly.
    """

    def split(x):
        x = jnp.asarray(x)
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        if x.shape[0] % parts:
            raise ValueError(
                f"the rows of {x.shape} cannot be split into {parts} equal parts; choose a number that "
                "divides the batch."
            )
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
