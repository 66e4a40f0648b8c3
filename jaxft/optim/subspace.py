"""ZOODiP's subspace gradient: removes directions in which the params have hardly moved."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxft.optim.directions import size, widest
from jaxft.optim.perturbations import wide


class SubspaceState(NamedTuple):
    """The state of `subspace_gradient`."""

    count: jax.Array  # [] int32, updates done
    visited: jax.Array  # [window, d], the params after the last updates
    removed: jax.Array  # [window, d] P: orthonormal rows, then zeros


def subspace_gradient(
    window: int = 128, threshold: float = 1e-3, *, samples: int | None = None
) -> optax.GradientTransformation:
    """g - (g P^T) P, P the directions of least variance of the last `window` params.

    Subspace gradient of ZOODiP: Seo et al., 2025, arxiv.org/abs/2503.14868, section 3.2. The params after
    each update are kept; each time the window is full they are standardised per coordinate, and

        B = U S V^T,  i* = min {i : Σ_{j<=i} S_j² / Σ_j S_j² > 1 - ν},  P = rows of V^T after i*.

    As in the authors' code, P is computed in standardised coordinates and applied to the gradient
    without standardisation, and directions that the window does not span are kept. Chain it before
    the optimizer, which in the paper is optax.adam(5e-3, eps=1e-3). It suits a few thousand params:
    the state holds 2 window d numbers.

    Args:
        window: τ.
        threshold: ν, the share of the variance that is removed; 0 removes nothing.
        samples: n of the estimator. If given, the result is divided by sqrt((d - rank P + n - 1) / n), the
            factor by which such an estimate is longer than the gradient: Adam's eps then means the same for
            all d.

    Raises:
        ValueError: for window < 1, threshold outside [0, 1) or samples < 1; in update for params=None.
    """
    # Under optax.inject_hyperparams the threshold is traced and cannot be checked.
    share = threshold if isinstance(threshold, (int, float)) else 0.0
    if window < 1 or not 0 <= share < 1 or (samples is not None and samples < 1):
        raise ValueError(
            "subspace_gradient: needs window >= 1, 0 <= threshold < 1 and samples >= 1, got "
            f"{window}, {threshold} and {samples}."
        )

    def init(params):
        d = size(params)
        if 0 < d <= window:
            warnings.warn(
                f"subspace_gradient: a window of {window} for {d} params may take out every direction; "
                "choose a window below the number of params.",
                stacklevel=2,
            )
        zeros = jnp.zeros((window, d), widest(params))
        return SubspaceState(jnp.zeros([], jnp.int32), zeros, jnp.zeros_like(zeros))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("subspace_gradient: params=None; call update(updates, state, params).")
        count, theta = state.count, wide(ravel_pytree(params)[0])
        # These are the params after update `count`; before the first there is nothing to keep.
        kept = state.visited.at[(count - 1) % window].set(theta)
        visited = jnp.where(count > 0, kept, state.visited)
        full = (count > 0) & (count % window == 0)
        removed = jax.lax.cond(
            full, lambda: low_variance_directions(visited, threshold), lambda: state.removed
        )
        g, unravel = ravel_pytree(updates)
        projected = g - (removed @ g) @ removed
        if samples is not None:
            rank = jnp.sum(jnp.any(removed != 0, axis=1))
            projected /= jnp.sqrt((g.size - rank + samples - 1) / samples)
        state = SubspaceState(optax.safe_increment(count), visited, removed)
        return unravel(projected.astype(g.dtype)), state

    return optax.GradientTransformation(init, update)


def low_variance_directions(visited: jax.Array, threshold: float) -> jax.Array:
    """P of `subspace_gradient`, [window, d]: orthonormal rows, zeros instead of kept directions."""
    centred = visited - jnp.mean(visited, axis=0, keepdims=True)
    spread = jnp.std(visited, axis=0, keepdims=True)
    _, singular, rows = jnp.linalg.svd(
        centred / jnp.where(spread > 0, spread, 1.0), full_matrices=False
    )
    variance = jnp.square(singular)
    # Row i is removed if the rows before it hold more than 1 - ν, that is if it and those after
    # hold less than ν. The sum starts from the small end, where rounding cannot make a share of 0
    # negative.
    rest = jnp.cumsum(variance[::-1])[::-1]
    removed = rows * (rest < threshold * jnp.sum(variance))[:, None]
    return jnp.zeros_like(visited).at[: rows.shape[0]].set(removed)
