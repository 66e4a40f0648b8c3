"""Advantages that give most or all of the update to some answers of a group.

They take the place of `grpo_advantages`: `grpo(build, 8, advantage=pass_at_k_advantages)`. Rows are
prompt-major, NaN (no verdict) gets 0, and no gradient flows through them, as in jaxft.rl.advantages.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.rl.advantages import centred_advantages, grpo_advantages, has_contrast

Advantage = Callable[[jax.Array, int], jax.Array]


def largest_advantages(keep: int, advantage: Advantage = grpo_advantages) -> Advantage:
    """Returns advantages of the `keep` answers of a group with the largest |A|, times G / keep; others get 0.

    CPPO: Lin et al., 2025, arxiv.org/abs/2503.22342: completions whose advantage is small are left out of the
    update; `collect(..., drop_idle=True)` then does not compute them. The factor keeps the mean over rows
    that of the kept ones. Of equal |A| the first are kept.

    Raises:
        ValueError: for fewer than one; when called, for more than the group has.
    """
    if keep < 1:
        raise ValueError(f"largest_advantages: keep must be at least 1, got {keep}.")

    def kept(rewards, group_size):
        if keep > group_size:
            raise ValueError(
                f"largest_advantages: keep {keep} is more than the group size {group_size}."
            )
        groups = advantage(rewards, group_size).reshape(-1, group_size)
        order = jnp.argsort(-jnp.abs(groups), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1, stable=True)
        return jnp.where(rank < keep, groups * (group_size / keep), 0.0).reshape(-1)

    return kept


def gpg_advantages(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """α (r - mean of the group), α = B / number of rows in groups whose rewards differ.

    GPG: Chu et al., 2025, arxiv.org/abs/2504.02546: groups without contrast have no gradient, and α restores
    its size. Use it with `reinforce()`, which has no ratio: one update per rollout. 0 where no group differs.
    """
    rows = jnp.sum(has_contrast(rewards, group_size)) * group_size
    scale = rewards.shape[0] / jnp.maximum(rows, 1)
    return jax.lax.stop_gradient(scale * centred_advantages(rewards, group_size))


def pass_at_k_advantages(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """r_max - r_second for the best answer of a group (the first of equal ones), 0 for the others.

    What the best answer adds to the best reward of its group, as in verl's GRPO for pass@k without division
    by the deviation; its paper is Tang et al., 2025, arxiv.org/abs/2503.19595.

    Raises:
        ValueError: if group_size is below 2 or does not divide B.
    """
    if group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            f"pass_at_k_advantages: group_size must be at least 2 and divide {rewards.shape[0]} rewards, got "
            f"{group_size}."
        )
    groups = rewards.reshape(-1, group_size)
    known = jnp.where(jnp.isnan(groups), -jnp.inf, groups)
    best = jnp.argmax(known, axis=1)
    two = jax.lax.top_k(known, 2)[0]
    gain = jnp.where(jnp.isfinite(two[:, 1]), two[:, 0] - two[:, 1], 0.0)
    found = jax.nn.one_hot(best, group_size) * gain[:, None]
    return jax.lax.stop_gradient(found.reshape(-1))
