"""Policy-gradient losses: log-probs and advantages in, one value per token (or sequence) out.

All are elementwise and unreduced: the caller masks and takes means. Where a loss takes a log-ratio
log π - log π_old, the caller chooses π_old; with one update per rollout it is the policy itself,
without gradient. Advantages and arguments named `old_` or `ref_` get no gradient.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.losses.supervised import CHUNK, scan_logits
from jaxft.weights import WeightLike

MAX_LOG_RATIO = 20.0  # e^20 is the largest ratio: one outlier must not make the loss infinite
_LOG_SMALLEST = -18.420681  # log 1e-8


def reinforce_loss(
    log_probs: Float[Array, "*batch"], advantages: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-A log π: Williams, 1992, doi.org/10.1007/BF00992696."""
    chex.assert_equal_shape([log_probs, advantages])
    return -jax.lax.stop_gradient(advantages) * log_probs


def log_ratio(
    log_probs: Float[Array, "*batch"], old_log_probs: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """log π - log π_old, the latter without gradient, within ±20."""
    chex.assert_equal_shape([log_probs, old_log_probs])
    difference = log_probs - jax.lax.stop_gradient(old_log_probs)
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratio(
    log_probs: Float[Array, "B T"], old_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Value mean_t(log π - log π_old) of the sequence at each token, with the gradient ∇ log π_t.

    GSPO's token form: Zheng et al., 2025, arxiv.org/abs/2507.18071, eq. 14. Averaged over a sequence's
    tokens, exp of it has the value and gradient of the length-normalised sequence ratio s (eq. 7).
    """
    counts = mask.astype(jnp.float32)
    own = jnp.where(mask, log_ratio(log_probs, old_log_probs), 0.0)
    mean = jnp.sum(own, axis=1, keepdims=True) / jnp.maximum(jnp.sum(counts, 1, keepdims=True), 1.0)
    return jax.lax.stop_gradient(mean) + log_probs - jax.lax.stop_gradient(log_probs)


def summed_log_ratio(
    log_probs: Float[Array, "B T"], old_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Value Σ_t (log π - log π_old) of the sequence at each token, within ±20, with the gradient ∇ log π_t.

    Summed over a sequence's tokens, the gradient of exp of it is that of the sequence's ratio π / π_old.
    """
    own = jnp.where(mask, log_ratio(log_probs, old_log_probs), 0.0)
    total = jnp.clip(jnp.sum(own, axis=1, keepdims=True), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jax.lax.stop_gradient(total) + log_probs - jax.lax.stop_gradient(log_probs)


def clipped_surrogate(
    log_ratio: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "*batch"]:
    """-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A), ρ the ratio.

    PPO: Schulman et al., 2017, arxiv.org/abs/1707.06347, eq. 7; two clips: DAPO, Yu et al., 2025,
    arxiv.org/abs/2503.14476, section 3.1 (0.2, 0.28). GSPO clips sequence ratios at (3e-4, 4e-4).

    Args:
        clip_low, clip_high: ε_low and ε_high; 1 disables the lower clip, infinity the upper one.
        dual_clip: c > 1 bounds the loss of negative advantages by c |A| (Ye et al., 2019,
            arxiv.org/abs/1912.09729).
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"clipped_surrogate: clips must be at least 0, got {clip_low} and {clip_high}."
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"clipped_surrogate: dual_clip must exceed 1, got {dual_clip}; try 3.")
    chex.assert_equal_shape([log_ratio, advantages])
    ratio, advantages = jnp.exp(log_ratio), jax.lax.stop_gradient(advantages)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def clipped_tokens(
    log_ratio: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    clip_low: float,
    clip_high: float,
) -> tuple[Bool[Array, "*batch"], Bool[Array, "*batch"]]:
    """(low, high): which tokens the lower and the upper clip keep from moving further."""
    ratio = jnp.exp(log_ratio)
    return (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def cispo_loss(
    log_probs: Float[Array, "*batch"],
    old_log_probs: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip_high: float = 5.0,
) -> Float[Array, "*batch"]:
    """-sg(min(ρ, ε_max)) A log π: no token loses its gradient.

    CISPO: MiniMax, 2025, arxiv.org/abs/2506.13585, whose lower clip is off in their runs.

    Args:
        clip_high: ε_max, the largest weight itself and not its distance from 1, as in ScaleRL (Khatri et
            al., 2025, arxiv.org/abs/2510.13786, which uses 5) and TRL's epsilon_high.
    """
    if clip_high <= 0:
        raise ValueError(f"cispo_loss: clip_high must be positive, got {clip_high}; 5 is usual.")
    ratio = jnp.exp(log_ratio(log_probs, old_log_probs))
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, clip_high))
    return weight * reinforce_loss(log_probs, advantages)


def sapo_loss(
    log_ratio: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
) -> Float[Array, "*batch"]:
    """-(4 / τ) σ(τ (ρ - 1)) A: a gate that falls smoothly as ρ leaves 1, instead of a clip.

    SAPO: Gao et al., 2025, arxiv.org/abs/2511.20347. Its gradient at ρ = 1 is REINFORCE's.

    Args:
        temperature_pos, temperature_neg: τ where A > 0, and elsewhere; larger ones fall faster.
    """
    if min(temperature_pos, temperature_neg) <= 0:
        raise ValueError(
            "sapo_loss: temperatures must be positive, got "
            f"{temperature_pos} and {temperature_neg}; the paper uses 1 and 1.05."
        )
    chex.assert_equal_shape([log_ratio, advantages])
    advantages = jax.lax.stop_gradient(advantages)
    tau = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return -(4.0 / tau) * jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1.0)) * advantages


def gamma_weights(
    log_ratios: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Float[Array, "*batch"]:
    """φ(w) = w^k e^(λ (1 - w)), no gradient: 1 at w = 1, and near 0 for w far below or above it.

    VESPO: 2026, arxiv.org/abs/2602.10693. -φ(w) A log π is its loss. As in TRL, log w is limited
    to [log 1e-8, 20].

    Args:
        log_ratios: log w of whole sequences, w = π / π_sampler.
        k_pos, lambda_pos: k and λ where A >= 0; k_neg, lambda_neg where A < 0.
    """
    if min(k_pos, k_neg) < 0 or min(lambda_pos, lambda_neg) <= 0:
        raise ValueError(
            "gamma_weights: k must be at least 0 and λ positive, got "
            f"{k_pos}, {k_neg} and {lambda_pos}, {lambda_neg}."
        )
    chex.assert_equal_shape([log_ratios, advantages])
    log_w = jnp.clip(log_ratios, _LOG_SMALLEST, MAX_LOG_RATIO)
    k = jnp.where(advantages >= 0, k_pos, k_neg)
    rate = jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    return jax.lax.stop_gradient(jnp.exp(k * log_w + rate * (1.0 - jnp.exp(log_w))))


def most_uncertain(
    entropies: Float[Array, "B T"], mask: Bool[Array, "B T"], share: float
) -> Bool[Array, "B T"]:
    """The masked tokens whose entropy is at least the (1 - share) quantile of the masked tokens' entropies.

    Wang et al., 2025, "Beyond the 80/20 rule", arxiv.org/abs/2506.01939, with a share of 0.2.
    """
    return mask & (entropies >= entropy_threshold(entropies, mask, share))


def entropy_threshold(
    entropies: Float[Array, "B T"], mask: Bool[Array, "B T"], share: float
) -> Float[Array, ""]:
    """The (1 - share) quantile of the masked tokens' entropies, in nats, interpolated; infinity without any.

    It is a value of all rows at once: the quantiles of parts of a batch are others.
    """
    if not 0 < share <= 1:
        raise ValueError(f"entropy_threshold: share must lie in (0, 1], got {share}; 0.2 is usual.")
    known = jnp.where(mask, entropies.astype(jnp.float32), jnp.nan)
    found = jnp.where(mask.any(), jnp.nanquantile(known, 1.0 - share), jnp.inf)
    return jax.lax.stop_gradient(found)


def nft_loss(
    log_ratio: Float[Array, "*batch"],
    correct: Bool[Array, "*batch"],
    success_rates: Float[Array, "*batch"],
    *,
    floor: float = 1.0,
    negative_weight: float = 1.0,
    max_log_ratio: float = 10.0,
) -> Float[Array, "*batch"]:
    """-log R of right answers; -λ log max_v((1 - r R) / (1 - r), ε) of wrong ones, R = π / π_old.

    max_v(x, ε) is `straight_through_max`. Negative-aware fine-tuning: Chen et al., 2025,
    arxiv.org/abs/2505.18116. On-policy, weighted by sqrt((1 - r) / r), its gradient is GRPO's (with
    the biased deviation); by 1 - r, Dr. GRPO's. The caller applies these weights and chooses how r
    is estimated.

    Args:
        correct: whether the answer (of this token) is right.
        success_rates: r, the share of right answers to the prompt; clipped to 0.02..0.98.
        floor: ε, positive; lower values give the gradient larger weights where R > 1.
        negative_weight: λ; 0 is rejection sampling.
    """
    if floor <= 0:
        raise ValueError(f"nft_loss: floor must be positive, got {floor}; the paper uses 1.")
    if negative_weight < 0:
        raise ValueError(f"nft_loss: negative_weight must be at least 0, got {negative_weight}.")
    chex.assert_equal_shape([log_ratio, correct, success_rates])
    rate = jax.lax.stop_gradient(jnp.clip(success_rates, 0.02, 0.98))
    log_ratio = jnp.minimum(log_ratio, max_log_ratio)
    implied = (1.0 - rate * jnp.exp(log_ratio)) / (1.0 - rate)
    negative = -jnp.log(straight_through_max(implied, floor))
    return jnp.where(correct, -log_ratio, negative_weight * negative)


def straight_through_max(x: Float[Array, "*batch"], floor: float) -> Float[Array, "*batch"]:
    """The value of max(x, floor) with the gradient of x."""
    return x + jax.lax.stop_gradient(jnp.maximum(x, floor) - x)


def kl_k1(
    log_probs: Float[Array, "*batch"], ref_log_probs: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """log π - log π_ref: unbiased for KL(π || π_ref) under samples of π, often negative.

    Schulman, 2020, "Approximating KL divergence", also for k2 and k3. Use it in the reward; in a
    loss its expected gradient is 0.
    """
    return log_ratio(log_probs, ref_log_probs)


def kl_k2(
    log_probs: Float[Array, "*batch"], ref_log_probs: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """(log π - log π_ref)² / 2: as a loss it has the gradient of KL(π || π_ref) under samples of π."""
    return 0.5 * log_ratio(log_probs, ref_log_probs) ** 2


def kl_k3(
    log_probs: Float[Array, "*batch"], ref_log_probs: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """e^d - d - 1 with d = log π_ref - log π: unbiased for KL(π || π_ref) and never negative.

    As a loss (GRPO's) it has the gradient of KL(π_ref || π).
    """
    d = -log_ratio(log_probs, ref_log_probs)
    return jnp.expm1(d) - d


def adapted_kl_weight(
    weight: float, kl: float, count: int, *, target: float = 6.0, horizon: float = 10000.0
) -> float:
    """β (1 + clip(KL / target - 1, ±0.2) n / horizon): β for the next rollout, up if the policy went too far.

    Ziegler et al., 2019, arxiv.org/abs/1909.08593, section 2.2, whose K_β = 0.1 is n / horizon here, as in
    their code.

    Args:
        weight: β of the KL in the reward.
        kl: measured, in nats of a whole response, so that the target does not depend on lengths.
        count: n, responses of the rollout that it was measured on.
    """
    if weight < 0 or target <= 0 or horizon <= 0:
        raise ValueError(
            "adapted_kl_weight: needs weight >= 0, target > 0 and horizon > 0, got "
            f"{weight}, {target} and {horizon}."
        )
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return weight * (1.0 + error * count / horizon)


def adapted_entropy_weight(
    weight: Float[Array, ""],
    entropy: Float[Array, ""],
    *,
    target: float,
    delta: float = 0.005,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Float[Array, ""]:
    """c + δ if the entropy is at most the target, else c - δ, within [lowest, highest]: c for the next step.

    Adaptive entropy control of Skywork-OR1: He et al., 2025, arxiv.org/abs/2505.22312, section 3.3. Its
    bonus has the weight c where the entropy is at most the target, and 0 elsewhere.

    Args:
        weight: c.
        entropy: of the policy, in nats per token.
    """
    if not 0 < target or not 0 < delta or not 0 <= lowest <= highest:
        raise ValueError(
            "adapted_entropy_weight: needs target > 0, delta > 0 and 0 <= lowest <= highest, got "
            f"{target}, {delta}, {lowest} and {highest}."
        )
    return jnp.clip(weight + jnp.where(entropy <= target, delta, -delta), lowest, highest)


def entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """-Σ_v p log p in nats, in float32; a token of probability 0 contributes 0."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def linear_entropy(
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "B T"]:
    """`entropy` of h_t W / temperature, holding the logits of `chunk` tokens per row at once."""
    of = lambda logits: entropy(logits / temperature)
    return scan_logits(of, hidden, head, softcap=softcap, chunk=chunk)


def clipped_value_loss(
    values: Float[Array, "*batch"],
    old_values: Float[Array, "*batch"],
    returns: Float[Array, "*batch"],
    *,
    clip: float = 0.2,
) -> Float[Array, "*batch"]:
    """½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²), as PPO's implementations have it."""
    if clip <= 0:
        raise ValueError(
            f"clipped_value_loss: clip must be positive, got {clip}; use infinity for no clip."
        )
    chex.assert_equal_shape([values, old_values, returns])
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)


def overlong_penalty(lengths: Float[Array, " B"], budget: int, buffer: int) -> Float[Array, " B"]:
    """0 up to budget - buffer tokens, then linearly to -1 at the budget: add it to rewards.

    DAPO: Yu et al., 2025, arxiv.org/abs/2503.14476, section 3.4.
    """
    if not 0 < buffer <= budget:
        raise ValueError(f"overlong_penalty: needs 0 < buffer <= budget, got {buffer}, {budget}.")
    return jnp.clip((budget - buffer - lengths) / buffer, -1.0, 0.0)
