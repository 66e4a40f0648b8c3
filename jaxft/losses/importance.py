"""Weights and masks for samples of another policy than the one that is trained. None gets a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.losses.policy import MAX_LOG_RATIO, log_ratio


def truncated_weights(
    old_log_probs: Float[Array, "*batch"],
    sampler_log_probs: Float[Array, "*batch"],
    *,
    cap: float = 2.0,
) -> Float[Array, "*batch"]:
    """min(π_old / π_sampler, C) per token, no gradient: corrects for the sampler's numerics.

    Truncated importance sampling: Ionides, 2008, doi.org/10.1198/106186008X320456. Multiply only
    the policy term by it, not KL, values or entropy. NaN log-probs give the weight 0.
    """
    if cap <= 0:
        raise ValueError(f"truncated_weights: cap must be positive, got {cap}.")
    return jnp.minimum(_weights(old_log_probs, sampler_log_probs), cap)


def banded_weights(
    old_log_probs: Float[Array, "*batch"],
    sampler_log_probs: Float[Array, "*batch"],
    *,
    low: float = 0.5,
    high: float = 2.0,
) -> Float[Array, "*batch"]:
    """π_old / π_sampler within [low, high], and 0 outside (masked importance sampling, IcePop)."""
    if not 0 <= low < high:
        raise ValueError(f"banded_weights: needs 0 <= low < high, got {low} and {high}.")
    weights = _weights(old_log_probs, sampler_log_probs)
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def truncated_sequence_weights(
    old_log_probs: Float[Array, "B T"],
    sampler_log_probs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
) -> Float[Array, " B"]:
    """min(Π_t π_old / π_sampler, C) per sequence, no gradient; unbiased below C, long ones vary more."""
    if cap <= 0:
        raise ValueError(f"truncated_sequence_weights: cap must be positive, got {cap}.")
    return jnp.minimum(_sequence_weights(old_log_probs, sampler_log_probs, mask), cap)


def banded_sequence_weights(
    old_log_probs: Float[Array, "B T"],
    sampler_log_probs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> Float[Array, " B"]:
    """Π_t π_old / π_sampler per sequence if within [low, high], and 0 outside; no gradient.

    Masked importance sampling of sequences, TRL's vllm_importance_sampling_mode "sequence_mask".
    """
    if not 0 <= low < high:
        raise ValueError(f"banded_sequence_weights: needs 0 <= low < high, got {low} and {high}.")
    weights = _sequence_weights(old_log_probs, sampler_log_probs, mask)
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def off_policy_kept(
    log_probs: Float[Array, "B T"],
    sampler_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    threshold: float,
) -> Bool[Array, "B T"]:
    """A >= 0, or mean_t(log π_sampler - log π) <= δ: which tokens an off-policy mask keeps.

    Off-policy sequence masking: DeepSeek-V3.2, 2025, arxiv.org/abs/2512.02556: a bad answer that
    the policy would hardly give any more teaches nothing, and can make training unstable.

    Args:
        threshold: δ in nats per token, positive.
    """
    if threshold <= 0:
        raise ValueError(f"off_policy_kept: threshold must be positive, got {threshold}; try 0.5.")
    # NaN: the sampler gave the token no log-prob, so it counts as no gap.
    gap = jnp.nan_to_num(jnp.where(mask, sampler_log_probs - log_probs, 0.0))
    mean = jnp.sum(gap, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, 1, keepdims=True), 1)
    return (advantages >= 0) | (mean <= threshold)


def _sequence_weights(old_log_probs, sampler_log_probs, mask):
    difference = jnp.where(mask, log_ratio(old_log_probs, sampler_log_probs), 0.0)
    total = jnp.clip(jnp.sum(difference, axis=1), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jax.lax.stop_gradient(jnp.nan_to_num(jnp.exp(total)))


def _weights(old_log_probs, sampler_log_probs):
    ratio = jnp.exp(log_ratio(old_log_probs, sampler_log_probs))
    return jax.lax.stop_gradient(jnp.nan_to_num(ratio))
