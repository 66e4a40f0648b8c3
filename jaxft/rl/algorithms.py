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
The formulas are in jaxft.rl.advantages and jaxft.losses.policy; this module combines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft import losses
from jaxft.objectives import Objective, value_loss
from jaxft.objectives.policy import (
    TokenLoss,
    constant_length,
    sequence_mean,
    sequence_sum,
    spread,
    token_mean,
)
from jaxft.rl.advantages import (
    baseline_advantages,
    centred_advantages,
    generalised_advantages,
    grpo_advantages,
    leave_one_out_advantages,
    placed_rewards,
    reinforce_plus_plus_advantages,
    success_rates,
    whiten,
)

Build = Callable[..., Objective]  # (token_loss, reduction) -> objective
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


def reinforce_with_baseline(build: Build, clip: float = 0.2) -> Algorithm:
    """-(r - mean of the batch) Σ_t log π_t: Williams, 1992, doi.org/10.1007/BF00992696.

    With several updates per rollout, the clipped ratio of each sequence replaces log π.
    """
    credit = lambda rewards, batch: {"advantages": centred_advantages(rewards, len(rewards))}
    return Algorithm(credit, build(clipped_sums(clip), sequence_sum))


def rloo(build: Build, group_size: int, reward_kl: float = 0.0, clip: float = 0.2) -> Algorithm:
    """RLOO: Ahmadian et al., 2024, arxiv.org/abs/2402.14740; leave-one-out baselines, summed tokens.

    Args:
        reward_kl: β of the KL to the reference in the reward (k1, summed); needs ref_log_probs.
        clip: ε for the ratio of each sequence, which is 1 at a rollout's first update: see `clipped_sums`.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        if (penalties := _penalties(batch, reward_kl)) is not None:
            rewards = rewards - jnp.sum(penalties, axis=1)
        return {"advantages": leave_one_out_advantages(rewards, group_size)}

    return Algorithm(credit, build(clipped_sums(clip), sequence_sum))


def grpo(build: Build, group_size: int, clip: float = 0.2) -> Algorithm:
    """GRPO: Shao et al., 2024, arxiv.org/abs/2402.03300, eq. 3; the KL is `kl_weight` of build."""
    return Algorithm(
        advantages(grpo_advantages, group_size), build(clipped(clip, clip), sequence_mean)
    )


def dr_grpo(build: Build, group_size: int, length: int, clip: float = 0.2) -> Algorithm:
    """Dr. GRPO: Liu et al., 2025, arxiv.org/abs/2503.20783: no division by deviation or response length.

    Args:
        length: the generation budget in tokens, by which sums over tokens are divided.
    """
    objective = build(clipped(clip, clip), constant_length(length))
    return Algorithm(advantages(centred_advantages, group_size), objective)


def dapo(
    build: Build, group_size: int, clip_low: float = 0.2, clip_high: float = 0.28
) -> Algorithm:
    """DAPO: Yu et al., 2025, arxiv.org/abs/2503.14476: two clip bounds, mean over all tokens.

    Its dynamic sampling is `until_contrast`, its overlong penalty `add_penalty` (jaxft.rl.transforms).
    """
    objective = build(clipped(clip_low, clip_high), token_mean)
    return Algorithm(advantages(grpo_advantages, group_size), objective)


def gspo(
    build: Build, group_size: int, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> Algorithm:
    """GSPO: Zheng et al., 2025, arxiv.org/abs/2507.18071: ratios of whole sequences."""
    objective = build(sequence_clipped(clip_low, clip_high), sequence_mean)
    return Algorithm(advantages(grpo_advantages, group_size), objective)


def cispo(build: Build, group_size: int, clip_high: float = 3.0) -> Algorithm:
    """CISPO: MiniMax, 2025, arxiv.org/abs/2506.13585: clips the weight, so every token keeps a gradient."""
    objective = build(weight_clipped(1.0, clip_high), token_mean)
    return Algorithm(advantages(grpo_advantages, group_size), objective)


def reinforce_plus_plus(build: Build, reward_kl: float = 0.0, clip: float = 0.2) -> Algorithm:
    """REINFORCE++: Hu et al., 2025, arxiv.org/abs/2501.03262: rewards to go, whitened over the batch.

    Args:
        reward_kl: β of the KL to the reference in each token's reward (k1); needs ref_log_probs.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        mask = jnp.asarray(batch["completion_mask"])
        penalties = _penalties(batch, reward_kl)
        return {"advantages": reinforce_plus_plus_advantages(rewards, mask, penalties)}

    return Algorithm(credit, build(clipped(clip, clip), sequence_mean))


def ppo(
    build: Build,
    reward_kl: float = 0.0,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
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
        placed = placed_rewards(jnp.nan_to_num(rewards), mask, _penalties(batch, reward_kl))
        values = jnp.asarray(batch["old_values"])
        advantages, returns = generalised_advantages(placed, values, mask, gamma, lam)
        return {
            "advantages": whiten(advantages, mask),
            "returns": returns,
            "completion_mask": mask,
        }

    critic = value_loss(value_weight, value_clip)
    return Algorithm(credit, build(clipped(clip, clip), token_mean, auxiliary=critic))


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


def reinforce() -> TokenLoss:
    """-A log π: see `reinforce_loss`. For one update per rollout; `clipped_sums` is for several.

    The TokenLoss raises ValueError if the batch has old_log_probs, which `collect` adds for several updates
    per rollout: -A log π has no importance ratio, so from the second update on its gradient is biased.
    """

    def token_loss(log_probs, old, batch):
        if "old_log_probs" in batch:
            raise ValueError(
                "reinforce: -A log π has no importance ratio, so it allows only one update a rollout "
                "(updates=1, epochs=1), but the batch has old_log_probs, as for several. For these, use "
                "clipped_sums() or clipped(), that is rloo, grpo, dapo or ppo."
            )
        return losses.reinforce_loss(log_probs, spread(batch["advantages"], log_probs)), {}

    return token_loss


def clipped_sums(clip: float = 0.2) -> TokenLoss:
    """REINFORCE's and RLOO's clipped ratio of each sequence's probability; use with `sequence_sum`.

    A sequence's tokens add up to -min(ρ A, clip(ρ, 1 ± ε) A), ρ = Π_t π / π_old, as in TRL's RLOOTrainer
    (huggingface.co/docs/trl/rloo_trainer). At the sampling policy, its gradient equals that of `reinforce`.
    """

    def token_loss(log_probs, old, batch):
        mask = batch["completion_mask"]
        ratio = losses.summed_log_ratio(log_probs, old, mask)
        loss, shown = _clipped(ratio, batch, clip, clip, None)
        # Each token gets an equal share of the sequence's value and the gradient of its own log-prob.
        share = 1.0 / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        return loss + jax.lax.stop_gradient((share - 1.0) * loss), shown

    return token_loss


def clipped(
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> TokenLoss:
    """PPO's, GRPO's and DAPO's clipped ratio of each token; logs the fraction clipped at each bound."""

    def token_loss(log_probs, old, batch):
        ratio = losses.log_ratio(log_probs, old)
        return _clipped(ratio, batch, clip_low, clip_high, dual_clip)

    return token_loss


def sequence_clipped(clip_low: float = 3e-4, clip_high: float = 4e-4) -> TokenLoss:
    """GSPO's clipped ratio of each sequence; use with `sequence_mean`."""

    def token_loss(log_probs, old, batch):
        ratio = losses.sequence_log_ratio(log_probs, old, batch["completion_mask"])
        return _clipped(ratio, batch, clip_low, clip_high, None)

    return token_loss


def weight_clipped(clip_low: float = 1.0, clip_high: float = 3.0) -> TokenLoss:
    """CISPO's clipped weight: see `cispo_loss`."""

    def token_loss(log_probs, old, batch):
        advantages = spread(batch["advantages"], log_probs)
        loss = losses.cispo_loss(log_probs, old, advantages, clip_low=clip_low, clip_high=clip_high)
        return loss, {}

    return token_loss


def negative_aware(
    prompt_weight: Callable[[jax.Array], jax.Array] = lambda rate: 1.0 - rate,
    *,
    floor: float = 1.0,
    negative_weight: float = 1.0,
) -> TokenLoss:
    """NFT's likelihoods of correct and wrong answers: see `nft_loss`.

    The batch has `correct` [B] (bool) and `success_rates` [B] instead of advantages. Prompts whose answers
    are all correct or all wrong have weight 0, as if they had been dropped.

    Args:
        prompt_weight: weight by success rate r: 1 - r (Dr. GRPO, on-policy), sqrt((1 - r) / r) (GRPO) or 1.
        floor, negative_weight: see `nft_loss`; negative_weight 0 and prompt_weight 1 are rejection sampling.
    """

    def token_loss(log_probs, old, batch):
        rates = batch["success_rates"]
        ratio = losses.log_ratio(log_probs, old)
        loss = losses.nft_loss(
            ratio,
            spread(batch["correct"], log_probs),
            spread(rates, log_probs),
            floor=floor,
            negative_weight=negative_weight,
        )
        mixed = (rates > 0) & (rates < 1)
        weight = jnp.where(mixed, prompt_weight(jnp.clip(rates, 0.02, 0.98)), 0.0)
        return spread(weight, log_probs) * loss, {}

    return token_loss


def advantages(function: Callable[[jax.Array, int], jax.Array], group_size: int) -> Credit:
    """Returns the credit that computes advantages by `function`(rewards, group_size)."""
    return lambda rewards, batch: {"advantages": function(rewards, group_size)}


def _penalties(batch, reward_kl):
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


def _clipped(ratio, batch, clip_low, clip_high, dual_clip):
    advantages = spread(batch["advantages"], ratio)
    loss = losses.clipped_surrogate(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    low, high = losses.clipped_tokens(ratio, advantages, clip_low, clip_high)
    return loss, {"clipped_low": low, "clipped_high": high}
