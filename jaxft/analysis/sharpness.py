"""Sharpness of minima, similarity of representations, and the loss along directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Loss = Callable[[Any], jax.Array]  # params -> scalar


def epsilon_sharpness(
    key: jax.Array,
    loss: Loss,
    params: Any,
    *,
    epsilon: float = 1e-3,
    steps: int = 20,
) -> jax.Array:
    """100 (max_y L(θ + y) - L(θ)) / (1 + L(θ)) over the box |y_i| <= ε (|θ_i| + 1), in percent.

    Keskar et al., 2017, arxiv.org/abs/1609.04836, metric 2.1, on the whole space. The maximum is approached
    by steepest ascent in the box's own norm: y moves by the gradient's signs times the box's sides
    and is projected; the moves shrink to 0. It starts from a random corner, because the gradient at
    a minimum is 0. The result is a lower bound. (Keskar et al. take 10 steps of L-BFGS-B, TRAM's
    authors projected gradients at ε = 1e-5, which float32 hardly resolves.)

    Args:
        key: for the first corner.
        loss: params -> scalar on a fixed set of data; must be at least 0 for a meaningful result.
        epsilon: ε, positive; Keskar et al.: 1e-3 and 5e-4.
        steps: number of gradients.
    """
    if not epsilon > 0 or steps < 1:
        raise ValueError(
            f"epsilon_sharpness: needs epsilon > 0 and steps >= 1, got {epsilon} and {steps}."
        )
    box = jax.tree.map(lambda p: epsilon * (jnp.abs(p) + 1), params)
    start = jax.tree.map(lambda b, e: b * e.astype(b.dtype), box, _corner(key, params))
    at = lambda y: loss(jax.tree.map(jnp.add, params, y))

    def ascend(state, size):
        y, best = state
        value, grads = jax.value_and_grad(at)(y)
        move = lambda y, b, g: jnp.clip(y + size.astype(b.dtype) * b * jnp.sign(g), -b, b)
        return (jax.tree.map(move, y, box, grads), jnp.maximum(best, value)), None

    here = loss(params)
    sizes = 2.0 * (1 - jnp.arange(steps) / steps)  # the first reaches any corner
    (y, best), _ = jax.lax.scan(ascend, (start, here), sizes)
    return 100 * (jnp.maximum(best, at(y)) - here) / (1 + here)


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred features x [N, D], y [N, E], in Frobenius norms: in [0, 1].

    Linear centred kernel alignment: Kornblith et al., 2019, arxiv.org/abs/1905.00414. It is
    invariant to rotations and to one scale of all features; constant features give 0.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"linear_cka: features must be [N, D] and [N, E] of the same N inputs, got {x.shape} and "
            f"{y.shape}."
        )
    x, y = (
        z.astype(jnp.float32) - jnp.mean(z.astype(jnp.float32), 0, keepdims=True) for z in (x, y)
    )
    norm = lambda a, b: jnp.linalg.norm(jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST))
    below = norm(x, x) * norm(y, y)
    return jnp.where(below > 0, norm(y, x) ** 2 / jnp.where(below > 0, below, 1.0), 0.0)


def filter_normalised(key: jax.Array, params: Any) -> Any:
    """A normal direction with each filter's norm equal to that of the params; 0 for vectors and scalars.

    Li et al., 2018, arxiv.org/abs/1712.09913, section 4: a plot along it does not depend on the
    scale of filters. A filter holds the weights of one output: the last axis of a kernel counts
    filters. Unstack layers first (jaxft.models.unstack_layers).
    """
    leaves, treedef = jax.tree.flatten(params)

    def direction(key, leaf):
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        draw = jax.random.normal(key, leaf.shape)
        norm = lambda x: jnp.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0)
        factor = norm(leaf.astype(jnp.float32)) / norm(draw)
        return (draw * jnp.expand_dims(factor, tuple(range(leaf.ndim - 1)))).astype(leaf.dtype)

    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(map(direction, keys, leaves))


def loss_along(
    loss: Loss, params: Any, directions: Sequence[Any], radii: Sequence[float] | jax.Array
) -> jax.Array:
    """L(θ + Σ_k r_k d_k) for every combination of radii, one axis per direction: [n], [n, n], ...

    For plots of a loss surface: one or two directions of `filter_normalised`, or the line between
    two models, with d = θ' - θ and radii from 0 to 1. Points are evaluated in sequence.
    """
    directions, radii = list(directions), jnp.asarray(radii, jnp.float32)
    if not directions or radii.ndim != 1:
        raise ValueError(
            f"loss_along: needs directions and radii [n], got {len(directions)} and radii {radii.shape}."
        )
    grid = jnp.stack(jnp.meshgrid(*[radii] * len(directions), indexing="ij"), axis=-1)

    def at(steps):
        point = params
        for step, direction in zip(steps, directions, strict=True):
            add = lambda p, d, s=step: p + (s * d).astype(p.dtype)
            point = jax.tree.map(add, point, direction)
        return loss(point)

    values = jax.lax.map(at, grid.reshape(-1, len(directions)))
    return values.reshape(grid.shape[:-1])


def _corner(key, params):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.rademacher(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
