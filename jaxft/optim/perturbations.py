"""Perturbations eps(params, grads) of params along their gradient, for sharpness-aware methods.

All norms are over the whole tree (on a mesh over all its devices), in float32 or wider. If the
gradient is zero everywhere, the perturbation is zero. eps is float32 (float64 for float64 params)
and is lost in params of coarser precision: keep trained params in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (params, grads) -> eps, a tree like the params in float32 or wider.
Perturbation = Callable[[Any, Any], Any]


def perturb_sam(rho: float | jax.Array = 0.05) -> Perturbation:
    """ρ g / ‖g‖: the ascent direction of a linear loss in a ball.

    Sharpness-aware minimisation: Foret et al., 2021, arxiv.org/abs/2010.01412, eq. 2 with p = 2.

    Args:
        rho: ρ, at least 0; may be traced (optax.inject_hyperparams, schedules).

    Raises:
        ValueError: for a negative or non-finite rho; the other functions check their numbers
            likewise.
    """
    _check("perturb_sam", rho=rho)

    def perturb(params, grads):
        del params
        scale = _ratio(rho, global_norm(grads))
        return jax.tree.map(lambda g: scale * wide(g), grads)

    return perturb


def perturb_asam(rho: float | jax.Array = 0.5, eta: float | jax.Array = 0.0) -> Perturbation:
    """ρ T² g / ‖T g‖ with T = |θ| + η: the ball is measured in each parameter's own scale.

    Adaptive SAM: Kwon et al., 2021, arxiv.org/abs/2102.11600. With η = 0, as in TRAM (Sherborne et
    al., 2023, arxiv.org/abs/2310.03646, eq. 7), ‖eps / θ‖ = ρ, and params that are 0 are not
    perturbed: the B of a new LoRA, biases. Kwon et al. take η = 0.01 for kernels.
    """
    _check("perturb_asam", rho=rho, eta=eta)

    def perturb(params, grads):
        sizes = jax.tree.map(lambda p: jnp.abs(wide(p)) + eta, params)
        scaled = jax.tree.map(lambda t, g: t * wide(g), sizes, grads)
        scale = _ratio(rho, global_norm(scaled))
        return jax.tree.map(lambda t, tg: scale * t * tg, sizes, scaled)

    return perturb


def perturb_fisher(gamma: float | jax.Array = 0.1, eta: float | jax.Array = 0.1) -> Perturbation:
    """γ F⁻¹ g / sqrt(g · F⁻¹ g) with F⁻¹ = 1 / (1 + η f) and f = g².

    Fisher SAM: Kim et al., 2022, arxiv.org/abs/2206.04920. The square root and 1 / (1 + η f) are as in two
    public implementations; the paper's text was not available. f stands for the diagonal of the
    Fisher information; it is the square of the batch's gradient here, as in those two, not the mean
    of squared gradients of single examples. TRAM's paper prints it without γ and the root. η = 0 is
    SAM with ρ = γ.
    """
    fisher = fisher_perturbation(gamma, eta)
    return lambda params, grads: fisher(grads, grads)


def fisher_perturbation(
    gamma: float | jax.Array, eta: float | jax.Array
) -> Callable[[Any, Any], Any]:
    """(grads, others) -> eps of `perturb_fisher` with f = others², the gradient at other inputs."""
    _check("perturb_fisher", gamma=gamma, eta=eta)

    def perturb(grads, others):
        inverse = lambda g, other: wide(g) / (1.0 + eta * jnp.square(wide(other)))
        natural = jax.tree.map(inverse, grads, others)
        products = jax.tree.map(lambda g, n: jnp.sum(wide(g) * n), grads, natural)
        scale = _ratio(gamma, _sqrt_of_sum(products))
        return jax.tree.map(lambda n: scale * n, natural)

    return perturb


def moved(params: Any, eps: Any) -> Any:
    """θ + eps in the params' data types; no gradient flows through eps."""
    add = lambda p, e: (wide(p) + e).astype(p.dtype)
    return jax.tree.map(add, params, jax.lax.stop_gradient(eps))


def global_norm(tree: Any) -> jax.Array:
    """sqrt of the sum of squares of all leaves, in float32 or wider; its gradient at 0 is 0."""
    return _sqrt_of_sum(jax.tree.map(lambda x: jnp.sum(jnp.square(jnp.abs(wide(x)))), tree))


def wide(x: Any) -> jax.Array:
    """x in float32, or in its own type where that is wider: float64 params keep their digits."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sqrt_of_sum(squares):
    square = sum(jax.tree.leaves(squares), jnp.zeros((), jnp.float32))
    # sqrt has an infinite slope at 0, and 0 times infinity is NaN, even in the unused branch.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), square)


def _ratio(rho, norm):
    # Not norm + 1e-12, as in the papers' code: that would shorten eps of tiny gradients.
    return jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)


def _check(name, **numbers):
    for argument, value in numbers.items():
        # Traced values cannot be checked.
        if isinstance(value, (int, float)) and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: {argument} must be finite and at least 0, got {value}.")
