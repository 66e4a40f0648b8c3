"""Reward models trained on pairs, outcomes or steps.

See jaxft.objectives.preferences for batches and jaxft.rewards.heads for the head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.losses import bradley_terry_loss, correctness_loss
from jaxft.metrics import Mean
from jaxft.models import Forward, of_group
from jaxft.models.checks import check_group, check_labels
from jaxft.objectives.next_token import Objective
from jaxft.objectives.preferences import all_tokens
from jaxft.rewards import sequence_rewards, token_rewards


def pairwise_reward(forward: Forward, *, center_rewards_coefficient: float = 0.0) -> Objective:
    """objective(params, batch, key) -> (mean `bradley_terry_loss`, metrics) of pairs.

    A column `margin` [B] is subtracted. Metrics: rewards/{chosen,rejected,margin,accuracy}, means over pairs.
    """

    def objective(params, batch, key):
        check_group(batch, 2, "pairwise_reward")
        rewards, present = sequence_rewards(forward, params, batch, key)
        counted = present[:, 0] * present[:, 1]
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        margin = batch.get("margin")
        values = bradley_terry_loss(
            chosen,
            rejected,
            None if margin is None else jnp.asarray(margin),
            center_rewards_coefficient=center_rewards_coefficient,
        )
        total = Mean.of(values, counted)
        columns = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": 0.5 * (1 + jnp.sign(chosen - rejected)),
        }
        metrics = {name: Mean.of(column, counted) for name, column in columns.items()}
        metrics |= {"loss": total, "num_tokens": all_tokens(batch, total)}
        return total.value, jax.lax.stop_gradient(metrics)

    return objective


def outcome_reward(forward: Forward) -> Objective:
    """objective(params, batch, key) -> (mean `correctness_loss`, metrics): is the first completion right?

    It is if the column `label` [B] is True or an integer above 0. Metrics: accuracy, mean over
    records.
    """

    def objective(params, batch, key):
        first = of_group(batch, 0)
        rewards, present = sequence_rewards(forward, params, first, key)
        labels = check_labels(batch, "outcome_reward")
        return _classified(rewards[:, 0], labels, present[:, 0])

    return objective


def process_reward(forward: Forward) -> Objective:
    """objective(params, batch, key) -> (mean `correctness_loss` of steps, metrics): is each step right?

    Columns: `step_ends` [B, S], the index of each step's last token in the first sequence, -1 if a
    record has no more steps, and `step_labels` [B, S]: bool or int, or floats that are
    probabilities of a right answer. The mean is over steps, not records. Metrics: accuracy, of labels
    above 0.5.
    """

    def objective(params, batch, key):
        first = of_group(batch, 0)
        values = token_rewards(forward, params, first, key)[:, 0]
        ends = jnp.asarray(batch["step_ends"])
        rewards = jnp.take_along_axis(values, jnp.maximum(ends, 0), axis=1)
        labels = jnp.asarray(batch["step_labels"])
        labels = labels if jnp.issubdtype(labels.dtype, jnp.floating) else labels.astype(bool)
        # Empty groups, which fill the last batch, have zeros in their columns.
        present = jnp.any(jnp.asarray(batch["loss_mask"][:, 0]) > 0, axis=1)[:, None]
        return _classified(rewards, labels, ((ends >= 0) & present).astype(jnp.float32))

    return objective


def _classified(rewards, labels, counted):
    total = Mean.of(correctness_loss(rewards, labels), counted)
    right = ((rewards > 0) == (labels > 0.5)).astype(jnp.float32)
    metrics = {"loss": total, "accuracy": Mean.of(right, counted)}
    return total.value, jax.lax.stop_gradient(metrics)
