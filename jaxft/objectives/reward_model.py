"""Reward models: a scalar head on a decoder's hidden states, trained on pairs, outcomes or steps.

Batches are those of jaxft.objectives.preference. The head is a leaf of the params, `reward/kernel` [D, 1],
that the decoder itself does not read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.losses import bradley_terry_loss, correctness_loss
from jaxft.metrics import Mean
from jaxft.objectives.preference import all_tokens
from jaxft.objectives.supervised import Objective
from jaxft.weights import matmul


def add_reward_head(key: jax.Array, params: Any, hidden_size: int) -> Any:
    """The params with a reward head, normal with variance 1 / (D + 1); it trains."""
    kernel = jax.random.normal(key, (hidden_size, 1)) / jnp.sqrt(hidden_size + 1.0)
    return {**params, "reward": {"kernel": kernel}}


def token_rewards(model, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The head's value [B, G, T] at each token, in float32."""
    if "reward" not in params:
        raise ValueError("reward model: the params have no 'reward' head; see add_reward_head.")
    shape = batch["tokens"].shape
    flat = {
        name: jnp.reshape(batch[name], (-1, shape[2]))
        for name in ("tokens", "segment_ids", "positions")
        if name in batch
    }
    output = model.apply(
        {"params": {name: leaf for name, leaf in params.items() if name != "reward"}},
        flat["tokens"],
        positions=flat.get("positions"),
        segment_ids=flat.get("segment_ids"),
    )
    hidden = output.hidden.astype(jnp.float32)
    return matmul(hidden, params["reward"]["kernel"])[..., 0].reshape(shape)


def sequence_rewards(
    model, params: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(rewards [B, G] at the last token of each completion, 1 where there is one)."""
    mask = jnp.asarray(batch["loss_mask"]) > 0
    last = mask.shape[2] - 1 - jnp.argmax(mask[..., ::-1], axis=2)
    values = token_rewards(model, params, batch)
    picked = jnp.take_along_axis(values, last[..., None], axis=2)[..., 0]
    return picked, jnp.any(mask, axis=2).astype(jnp.float32)


def pairwise_reward(model, *, center_rewards_coefficient: float = 0.0) -> Objective:
    """objective(params, batch, key) -> (mean `bradley_terry_loss`, metrics) of pairs.

    A column `margin` [B] is subtracted. Metrics: rewards/{chosen,rejected,margin,accuracy}, means over pairs.
    """

    def objective(params, batch, key):
        del key
        rewards, present = sequence_rewards(model, params, batch)
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


def outcome_reward(model) -> Objective:
    """objective(params, batch, key) -> (mean `correctness_loss`, metrics): is the first completion right?

    The column `label` [B] says so. Metrics: accuracy, mean over records.
    """

    def objective(params, batch, key):
        del key
        first = {k: v[:, :1] for k, v in batch.items() if jnp.ndim(v) == 3}
        rewards, present = sequence_rewards(model, params, first)
        labels = jnp.asarray(batch["label"]).astype(bool)
        return _classified(rewards[:, 0], labels, present[:, 0])

    return objective


def process_reward(model) -> Objective:
    """objective(params, batch, key) -> (mean `correctness_loss` of steps, metrics): is each step right?

    Columns `step_ends` [B, S], the place of each step's last token in the first sequence, -1 where a record
    has no more steps, and `step_labels` [B, S]. The mean is over steps, not records. Metrics: accuracy.
    """

    def objective(params, batch, key):
        del key
        first = {k: v[:, :1] for k, v in batch.items() if jnp.ndim(v) == 3}
        values = token_rewards(model, params, first)[:, 0]
        ends = jnp.asarray(batch["step_ends"])
        rewards = jnp.take_along_axis(values, jnp.maximum(ends, 0), axis=1)
        labels = jnp.asarray(batch["step_labels"]).astype(bool)
        # Empty groups, which fill a last batch, have zeros in their columns.
        present = jnp.any(jnp.asarray(batch["loss_mask"][:, 0]) > 0, axis=1)[:, None]
        return _classified(rewards, labels, ((ends >= 0) & present).astype(jnp.float32))

    return objective


def _classified(rewards, labels, counted):
    total = Mean.of(correctness_loss(rewards, labels), counted)
    right = ((rewards > 0) == labels).astype(jnp.float32)
    metrics = {"loss": total, "accuracy": Mean.of(right, counted)}
    return total.value, jax.lax.stop_gradient(metrics)
