"""Losses of sampled tokens for `policy_gradient`: (log_probs, old_log_probs, batch) -> (loss, metrics)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxft import losses
from jaxft.objectives.policy import Correction, TokenLoss, spread


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


def clipped_sums(clip_low: float = 0.2, clip_high: float = 0.2) -> TokenLoss:
    """REINFORCE's and RLOO's clipped ratio of each sequence's probability; use with `sequence_sum`.

    A sequence's tokens add up to -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A), ρ = Π_t π / π_old, as in
    TRL's RLOOTrainer (huggingface.co/docs/trl/rloo_trainer). At the sampling policy, its gradient equals
    that of `reinforce`.
    """

    def token_loss(log_probs, old, batch):
        mask = batch["completion_mask"]
        ratio = losses.summed_log_ratio(log_probs, old, mask)
        loss, shown = _clipped(ratio, batch, clip_low, clip_high, None)
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


def weight_clipped(clip_high: float = 5.0) -> TokenLoss:
    """CISPO's clipped weight: see `cispo_loss`."""

    def token_loss(log_probs, old, batch):
        advantages = spread(batch["advantages"], log_probs)
        return losses.cispo_loss(log_probs, old, advantages, clip_high=clip_high), {}

    return token_loss


def soft_gated(temperature_pos: float = 1.0, temperature_neg: float = 1.05) -> TokenLoss:
    """SAPO's gated ratio of each token: see `sapo_loss`."""

    def token_loss(log_probs, old, batch):
        advantages = spread(batch["advantages"], log_probs)
        taus = {"temperature_pos": temperature_pos, "temperature_neg": temperature_neg}
        return losses.sapo_loss(losses.log_ratio(log_probs, old), advantages, **taus), {}

    return token_loss


def gamma_weighted(correction: Correction | None = None, **shape: float) -> TokenLoss:
    """VESPO's -φ(w) A log π of each token, w = Π_t π / π_old times the corrections of its tokens."""

    def token_loss(log_probs, old, batch):
        mask = batch["completion_mask"]
        ratio = losses.log_ratio(log_probs, old)
        if correction is not None:
            weights = correction(old, batch["sampler_log_probs"], mask)
            ratio = ratio + jnp.log(jnp.maximum(weights, 1e-8))
        total = jnp.sum(jnp.where(mask, ratio, 0.0), axis=1, keepdims=True)
        advantages = spread(batch["advantages"], log_probs)
        weights = losses.gamma_weights(jnp.broadcast_to(total, mask.shape), advantages, **shape)
        return weights * losses.reinforce_loss(log_probs, advantages), {"weight": weights}

    return token_loss


def off_policy_masked(token_loss: TokenLoss, threshold: float) -> TokenLoss:
    """Returns the loss without bad answers that the policy has moved away from: `off_policy_kept`.

    Logs the share of tokens kept.
    """

    def masked(log_probs, old, batch):
        loss, shown = token_loss(log_probs, old, batch)
        kept = losses.off_policy_kept(
            jax.lax.stop_gradient(log_probs),
            batch["sampler_log_probs"],
            spread(batch["advantages"], log_probs),
            batch["completion_mask"],
            threshold=threshold,
        )
        return jnp.where(kept, loss, 0.0), shown | {"on_policy": kept}

    return masked


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


def _clipped(ratio, batch, clip_low, clip_high, dual_clip):
    advantages = spread(batch["advantages"], ratio)
    loss = losses.clipped_surrogate(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    low, high = losses.clipped_tokens(ratio, advantages, clip_low, clip_high)
    return loss, {"clipped_low": low, "clipped_high": high}
