"""Credit of several rewards that are normalised one by one."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxft.rewards.several import weighted_sums
from jaxft.rl.advantages import normalised_sum_advantages
from jaxft.rl.algorithms import Credit


def normalised_sums(weights: Sequence[float], group_size: int) -> Credit:
    """A credit with the advantages of `normalised_sum_advantages`, for rewards that are `SeveralRewards`.

    It takes the place of the credit of grpo, dapo, gspo, luspo, cispo, sapo or vespo. TRL's
    multi_objective_aggregation "normalize_then_sum".

    Args:
        weights: those of the SeveralRewards.
        group_size: answers to each prompt, at least 2.

    Raises:
        ValueError: for a group size below 2; when called, if the batch has not the rewards one by one, or
            their sums were changed (`add_penalty`), which the advantages would not contain.
    """
    if group_size < 2:
        raise ValueError(f"normalised_sums: group_size must be at least 2, got {group_size}.")

    def credit(rewards, batch):
        parts = batch.get("reward_parts")
        if parts is None or np.shape(parts)[1:] != (len(weights),):
            has = f"reward_parts {np.shape(parts)[1:]}"
            raise ValueError(
                f"normalised_sums: the batch has {has} for {len(weights)} weights; "
                "pass SeveralRewards with as many functions to rl.answers."
            )
        sums = weighted_sums(parts, weights)
        if not np.allclose(np.asarray(rewards), sums, rtol=1e-5, atol=1e-6, equal_nan=True):
            raise ValueError(
                "normalised_sums: rewards were changed after they were added (add_penalty), which advantages "
                "of single rewards do not contain; make the change one more of the reward functions."
            )
        given = jnp.asarray(parts), jnp.asarray(weights, jnp.float32)
        return {"advantages": normalised_sum_advantages(*given, group_size)}

    return credit
