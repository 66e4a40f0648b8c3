"""What follows a run and changes no update: a reference that moves after the params, the mean of a metric.

Both are optax transforms, so that their state is saved, restored and laid out as an optimizer's is; chain
them last. `optax.tree_utils.tree_get(opt_state, "reference")`, or "running_mean", reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.optim.perturbations import wide


class MovingReferenceState(NamedTuple):
    """Of `moving_reference`."""

    updates: jax.Array  # [] int32, since the start
    reference: optax.Params  # π_ref, of what trains


def moving_reference(alpha: float, every: int) -> optax.GradientTransformation:
    """Keeps a reference that follows the params: π_ref <- α π + (1 - α) π_ref after every τ-th update.

    TR-DPO: Gorbatovski et al., 2024, arxiv.org/abs/2404.09656: its soft update for α below 1, its hard one
    for α = 1. The reference is of what trains: of an adapter's factors rather than of the kernels that they
    make, which is the same for α = 1 alone.

    Args:
        alpha: α in (0, 1], what the reference takes of the params; the paper's is 0.6.
        every: τ, updates between two moves.
    """
    if not 0 < alpha <= 1 or every < 1:
        raise ValueError(
            f"moving_reference: alpha must lie in (0, 1] and every be at least 1, got {alpha} and {every}."
        )

    def init(params):
        # A copy: train steps donate params, and an alias would be freed with them.
        return MovingReferenceState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("moving_reference: params=None; call update(updates, state, params).")
        number = state.updates + 1
        weight = jnp.where(number % every == 0, alpha, 0.0)
        follow = lambda ref, new: jnp.where(weight == 0, ref, _mix(ref, new, weight))
        reference = jax.tree.map(follow, state.reference, optax.apply_updates(params, updates))
        return updates, MovingReferenceState(number, reference)

    return optax.GradientTransformation(init, update)


class RunningMeanState(NamedTuple):
    """Of `running_mean`."""

    running_mean: jax.Array  # [] float32
    running_weight: jax.Array  # [] float32, of what it is a mean of


def running_mean(metric: str) -> optax.GradientTransformationExtraArgs:
    """Keeps the mean of a metric over all updates so far, weighted as its `Mean`s are.

    Args:
        metric: its name among the `metrics` that update is given, as `train.make_step` does.
    """

    def init(params):
        del params
        return RunningMeanState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None, *, metrics: dict[str, Any], **extra):
        del params, extra
        after = RunningMeanState(*with_mean(*state, metrics[metric]))
        return updates, jax.tree.map(lambda x: x.astype(jnp.float32), after)

    return optax.GradientTransformationExtraArgs(init, update)


def with_mean(mean: jax.Array, weight: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
    """(mean, weight) with a part more: its `total`, a sum, and its `weight`."""
    whole = weight + part.weight
    # Not the sum so far: it would outgrow float32.
    return mean + (part.total - part.weight * mean) / jnp.maximum(whole, 1e-9), whole


def _mix(old, new, weight):
    return (weight * wide(new) + (1 - weight) * wide(old)).astype(old.dtype)
