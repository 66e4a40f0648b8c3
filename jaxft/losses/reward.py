"""Losses of reward models."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def bradley_terry_loss(
    chosen_rewards: Float[Array, " B"],
    rejected_rewards: Float[Array, " B"],
    margin: Float[Array, " B"] | None = None,
    *,
    center_rewards_coefficient: float = 0.0,
) -> Float[Array, " B"]:
    """-log σ(r_w - r_l - margin) + c (r_w + r_l)².

    Bradley & Terry, 1952, doi.org/10.2307/2334029; with the margin: Touvron et al., 2023,
    arxiv.org/abs/2307.09288, eq. 2; with c, which keeps the mean near 0: Eisenstein et al., 2023,
    arxiv.org/abs/2312.09244.
    """
    chex.assert_equal_shape([chosen_rewards, rejected_rewards])
    difference = chosen_rewards - rejected_rewards
    if margin is not None:
        chex.assert_equal_shape([difference, margin])
        difference = difference - margin
    centre = jnp.square(chosen_rewards + rejected_rewards)
    return -jax.nn.log_sigmoid(difference) + center_rewards_coefficient * centre


def correctness_loss(
    rewards: Float[Array, "*batch"], labels: Bool[Array, "*batch"] | Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-log σ(r) where the label is True, -log σ(-r) where it is False; y of the first, 1 - y of the second.

    A label y in [0, 1] is the probability that a prefix leads to a right answer, as Monte Carlo rollouts
    estimate it (Wang et al., 2023, arxiv.org/abs/2312.08935, eqs. 4 and 5).

    Outcome reward models use it once per completion (Cobbe et al., 2021, arxiv.org/abs/2110.14168),
    process reward models once per step, at its last token (Lightman et al., 2023,
    arxiv.org/abs/2305.20050).
    """
    chex.assert_equal_shape([rewards, labels])
    if labels.dtype == bool:
        return -jax.nn.log_sigmoid(jnp.where(labels, rewards, -rewards))
    return -labels * jax.nn.log_sigmoid(rewards) - (1 - labels) * jax.nn.log_sigmoid(-rewards)
