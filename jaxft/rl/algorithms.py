"""Algorithms of reinforcement learning: a credit function of the rewards and an objective that uses it.

Each is a function of `build`, a partial of `policy_gradient` with the model and the shared settings:

    build = functools.partial(policy_gradient, model.forward, temperature=0.9, kl_weight=0.01)
    credit, objective = grpo(build, group_size=8)
    sample = answers(model, tokenizer, rewards, SamplingConfig(16, temperature=0.9), group_size=8)
    batches = collect(
        Prompts(ids, per_step=4, records=records), sample, credit, add_reference(model.forward, params, 0.9)
    )
    fit(params, objective, optimizer, batches, steps=100)

Write others from the same parts: Algorithm(advantages(centred_advantages, 8), build(clipped(), token_mean)).
The formulas are in jaxft.rl.advantages, jaxft.rl.token_losses and jaxft.losses.policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft import losses
from jaxft.objectives import Objective, value_loss
from jaxft.objectives.policy import (
    Correction,
    constant_length,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from jaxft.rl.advantages import (
    baseline_advantages,
    centred_advantages,
    generalised_advantages,
    grpo_advantages,
    leave_one_out_advantages,
    normalised_advantages,
    placed_rewards,
    reinforce_plus_plus_advantages,
    success_rates,
    whiten,
)
from jaxft.rl.token_losses import (
    clipped,
    clipped_sums,
    gamma_weighted,
    negative_aware,
    reinforce,
    sequence_clipped,
    soft_gated,
    weight_clipped,
)

Build = Callable[..., Objective]  # (token_loss, reduction) -> objective
Advantage = Callable[[jax.Array, int], jax.Array]  # (rewards [B], group_size) -> [B]
# (rewards [B], batch) -> further fields that the objective needs, such as {"advantages": [B]}
Credit = Callable[[jax.Array, dict[str, Any]], dict[str, Any]]


class Algorithm(NamedTuple):
    """A credit for `collect` and an objective for `fit`."""

    credit: Credit  # (rewards [B], batch) -> fields of the batch
    objective: Objective


def reads_kl_weight(credit: Credit) -> Credit:
    """Marks a credit whose KL weight is `batch["kl_weight"]`, as `kl_control` of `collect` requires."""
    credit.reads_kl_weight = True
    return credit


def reinforce_with_baseline(
    build: Build, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Algorithm:
    """-(r - mean of the batch) Σ_t log π_t: Williams, 1992, doi.org/10.1007/BF00992696.

    With several updates per rollout, the clipped ratio of each sequence replaces log π.
    """
    credit = lambda rewards, batch: {"advantages": centred_advantages(rewards, len(rewards))}
    return Algorithm(credit, build(clipped_sums(clip_low, clip_high), sequence_sum))


def rloo(
    build: Build,
    group_size: int,
    reward_kl: float = 0.0,
    *,
    normalised: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Algorithm:
    """RLOO: Ahmadian et al., 2024, arxiv.org/abs/2402.14740; leave-one-out baselines, summed tokens.

    Args:
        reward_kl: β of the KL to the reference in the reward (k1, summed); needs ref_log_probs.
        normalised: normalises advantages over the rollout (`normalised_advantages`).
        clip_low, clip_high: ε_low and ε_high for the ratio of each sequence, which is 1 at a rollout's first
            update: see `clipped_sums`.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        if (penalties := kl_penalties(batch, reward_kl)) is not None:
            rewards = rewards - jnp.sum(penalties, axis=1)
        found = leave_one_out_advantages(rewards, group_size)
        return {"advantages": normalised_advantages(found, rewards) if normalised else found}

    return Algorithm(credit, build(clipped_sums(clip_low, clip_high), sequence_sum))


def grpo(
    build: Build,
    group_size: int,
    *,
    advantage: Advantage = grpo_advantages,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Algorithm:
    """GRPO: Shao et al., 2024, arxiv.org/abs/2402.03300, eq. 3; the KL is `kl_weight` of build.

    Args:
        advantage: of the rewards in groups, here and below: `grpo_advantages`, `batch_scaled_advantages`
            or `centred_advantages` (TRL's scale_rewards "group", "batch" and "none").
    """
    objective = build(clipped(clip_low, clip_high), sequence_mean)
    return Algorithm(advantages(advantage, group_size), objective)


def dr_grpo(
    build: Build, group_size: int, length: int, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Algorithm:
    """Dr. GRPO: Liu et al., 2025, arxiv.org/abs/2503.20783: no division by deviation or response length.

    Args:
        length: the generation budget in tokens, by which sums over tokens are divided.
    """
    objective = build(clipped(clip_low, clip_high), constant_length(length))
    return Algorithm(advantages(centred_advantages, group_size), objective)


def dapo(
    build: Build,
    group_size: int,
    *,
    advantage: Advantage = grpo_advantages,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Algorithm:
    """DAPO: Yu et al., 2025, arxiv.org/abs/2503.14476: two clip bounds, mean over all tokens.

    Its dynamic sampling is `until_contrast`, its overlong penalty `add_penalty` (jaxft.rl.transforms).
    """
    objective = build(clipped(clip_low, clip_high), token_mean)
    return Algorithm(advantages(advantage, group_size), objective)


def gspo(
    build: Build,
    group_size: int,
    *,
    advantage: Advantage = grpo_advantages,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Algorithm:
    """GSPO: Zheng et al., 2025, arxiv.org/abs/2507.18071: ratios of whole sequences."""
    objective = build(sequence_clipped(clip_low, clip_high), sequence_mean)
    return Algorithm(advantages(advantage, group_size), objective)


def luspo(
    build: Build,
    group_size: int,
    *,
    advantage: Advantage = grpo_advantages,
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
) -> Algorithm:
    """LUSPO: 2026, arxiv.org/abs/2602.05261: GSPO whose sequences count by their lengths.

    The paper's loss of a sequence is its length times GSPO's, that is the sum over its tokens. The clips are
    those of its section 5.1, wider than GSPO's.
    """
    objective = build(sequence_clipped(clip_low, clip_high), sequence_sum)
    return Algorithm(advantages(advantage, group_size), objective)


def cispo(
    build: Build,
    group_size: int,
    *,
    advantage: Advantage = grpo_advantages,
    clip_high: float = 5.0,
) -> Algorithm:
    """CISPO: MiniMax, 2025, arxiv.org/abs/2506.13585: clips the weight, so every token keeps a gradient."""
    objective = build(weight_clipped(clip_high), token_mean)
    return Algorithm(advantages(advantage, group_size), objective)


def sapo(
    build: Build, group_size: int, *, advantage: Advantage = grpo_advantages, **temperatures: float
) -> Algorithm:
    """SAPO: Gao et al., 2025, arxiv.org/abs/2511.20347: a smooth gate of each ratio; see `sapo_loss`."""
    objective = build(soft_gated(**temperatures), sequence_mean)
    return Algorithm(advantages(advantage, group_size), objective)


def vespo(
    build: Build,
    group_size: int,
    *,
    advantage: Advantage = grpo_advantages,
    correction: Correction | None = None,
    **shape: float,
) -> Algorithm:
    """VESPO: 2026, arxiv.org/abs/2602.10693: the weight of a sequence is `gamma_weights` of its ratio.

    Args:
        correction: per token; enters the ratio of the sequence instead of multiplying the loss.
        shape: k_pos, lambda_pos, k_neg, lambda_neg of `gamma_weights`.
    """
    objective = build(gamma_weighted(correction, **shape), token_mean, correction=None)
    return Algorithm(advantages(advantage, group_size), objective)


def reinforce_plus_plus(
    build: Build, reward_kl: float = 0.0, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Algorithm:
    """REINFORCE++: Hu et al., 2025, arxiv.org/abs/2501.03262: rewards to go, whitened over the batch.

    Args:
        reward_kl: β of the KL to the reference in each token's reward (k1); needs ref_log_probs.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        mask = jnp.asarray(batch["completion_mask"])
        penalties = kl_penalties(batch, reward_kl)
        return {"advantages": reinforce_plus_plus_advantages(rewards, mask, penalties)}

    return Algorithm(credit, build(clipped(clip_low, clip_high), sequence_mean))


def ppo(
    build: Build,
    reward_kl: float = 0.0,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.1,
) -> Algorithm:
    """PPO: Schulman et al., 2017, arxiv.org/abs/1707.06347, with a critic, whitened GAE and KL in the reward.

    The form for language models (Ziegler et al., 2019, arxiv.org/abs/1909.08593; Ouyang et al., 2022,
    arxiv.org/abs/2203.02155): returns from advantages before whitening, means over all tokens. The params
    need a value head (`with_value_head`). Responses without a verdict are excluded from the loss.

    Args:
        reward_kl: β of the KL to the reference in each token's reward (k1); needs ref_log_probs.
        gamma, lam: see `generalised_advantages`; use lam=1 for long reasoning.
        value_clip, value_weight: see `value_loss`.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        if "old_values" not in batch:
            raise ValueError("ppo: no old_values; give the params a value head (with_value_head).")
        mask = jnp.asarray(batch["completion_mask"]) & ~jnp.isnan(rewards)[:, None]
        placed = placed_rewards(jnp.nan_to_num(rewards), mask, kl_penalties(batch, reward_kl))
        values = jnp.asarray(batch["old_values"])
        advantages, returns = generalised_advantages(placed, values, mask, gamma, lam)
        return {
            "advantages": whiten(advantages, mask),
            "returns": returns,
            "completion_mask": mask,
        }

    critic = value_loss(value_weight, value_clip)
    return Algorithm(credit, build(clipped(clip_low, clip_high), token_mean, auxiliary=critic))


def expert_iteration(build: Build) -> Algorithm:
    """Cross-entropy of correct answers: Anthony et al., 2017, arxiv.org/abs/1705.08439; rejection sampling.

    -r log π with rewards in {0, 1}, over all tokens. This is the online form: duplicate answers are kept,
    and each step's answers come from the current policy. With several updates per rollout the objective
    raises ValueError (`reinforce`).
    """
    credit = lambda rewards, batch: {
        "advantages": baseline_advantages(rewards, jnp.zeros_like(rewards))
    }
    return Algorithm(credit, build(reinforce(), token_mean))


def nft(
    build: Build,
    group_size: int,
    prompt_weight: Callable[[jax.Array], jax.Array] = lambda rate: 1.0 - rate,
    negative_weight: float = 1.0,
) -> Algorithm:
    """Negative-aware fine-tuning: Chen et al., 2025, arxiv.org/abs/2505.18116.

    An answer is correct if its reward is at least 1. An answer without a verdict counts as wrong, as a
    truncated answer does in the paper.
    """

    def credit(rewards, batch):
        correct = jnp.nan_to_num(rewards) >= 1.0
        rates = success_rates(correct.astype(jnp.float32), group_size)
        return {"correct": correct, "success_rates": rates}

    loss = negative_aware(prompt_weight, negative_weight=negative_weight)
    return Algorithm(credit, build(loss, token_mean))


def advantages(function: Advantage, group_size: int) -> Credit:
    """Returns the credit that computes advantages by `function`(rewards, group_size)."""
    return lambda rewards, batch: {"advantages": function(rewards, group_size)}


def kl_penalties(batch: dict[str, Any], reward_kl: float) -> jax.Array | None:
    """β k1 to the reference at the sampling policy, [B, N]; None if β is 0 and not adapted."""
    if not reward_kl and "kl_weight" not in batch:
        return None
    if "ref_log_probs" not in batch:
        raise ValueError(
            "reward_kl needs ref_log_probs in the batch; pass add_reference to collect."
        )
    old = jnp.asarray(batch.get("old_log_probs", batch["sampler_log_probs"]))
    weight = jnp.asarray(batch["kl_weight"])[:, None] if "kl_weight" in batch else reward_kl
    kl = losses.kl_k1(old, jnp.asarray(batch["ref_log_probs"]))
    return jnp.where(batch["completion_mask"], weight * kl, 0.0)
