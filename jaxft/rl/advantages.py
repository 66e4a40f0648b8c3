"""Advantages: how much better than a baseline each response or token was, from rewards.

Rows are prompt-major: the rows of one prompt, a group, are adjacent. A NaN reward (no verdict) is excluded
from baselines and gets advantage 0. No gradient flows through an advantage.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def grpo_advantages(
    rewards: Float[Array, " B"], group_size: int, *, eps: float = 1e-4
) -> Float[Array, " B"]:
    """(r - mean) / (std + ε) in each group, with the unbiased standard deviation.

    GRPO: Shao et al., 2024, arxiv.org/abs/2402.03300, section 4.1.2. A group of equal rewards gets 0. With
    a group size of 1 there is no baseline: A = r. Over a whole batch (group_size = B) it is REINFORCE
    with normalised rewards.

    Raises:
        ValueError: if group_size does not divide B.
    """
    groups, counted = _groups(rewards, group_size, "grpo_advantages")
    if group_size == 1:
        return _rows(groups)
    centred = _centred(groups, counted)
    spare = jnp.maximum(_count(counted) - 1, 1)
    std = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / spare)
    return _rows(centred / (std + eps))


def centred_advantages(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """r - mean in each group: Dr. GRPO, Liu et al., 2025, arxiv.org/abs/2503.20783.

    Unlike GRPO it does not divide by the deviation, which would give easy and hard prompts the most weight.
    With a group size of 1, A = r; with B it is REINFORCE with the batch's mean as baseline.
    """
    groups, counted = _groups(rewards, group_size, "centred_advantages")
    return _rows(groups if group_size == 1 else _centred(groups, counted))


def leave_one_out_advantages(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """r_i minus the mean of the other rewards of its group, = n / (n - 1) (r_i - mean).

    RLOO: Kool et al., 2019; Ahmadian et al., 2024, arxiv.org/abs/2402.14740. Unbiased: a
    response is not in its own baseline. If it is the only one of its group with a verdict, it gets 0.

    Raises:
        ValueError: if group_size is below 2.
    """
    if group_size < 2:
        raise ValueError(
            f"leave_one_out_advantages: group_size must be at least 2, got {group_size}; "
            "sample more responses per prompt."
        )
    groups, counted = _groups(rewards, group_size, "leave_one_out_advantages")
    count = _count(counted)
    return _rows(_centred(groups, counted) * count / jnp.maximum(count - 1, 1))


def batch_scaled_advantages(
    rewards: Float[Array, " B"], group_size: int, *, eps: float = 1e-4
) -> Float[Array, " B"]:
    """(r - mean of its group) / (std of the batch + ε), with the unbiased standard deviation.

    Liu et al., 2025, "Tricks or traps?", arxiv.org/abs/2508.08221; TRL's scale_rewards="batch".

    Raises:
        ValueError: if group_size is below 2: every reward is then its own mean.
    """
    if group_size < 2:
        raise ValueError(
            f"batch_scaled_advantages: group_size must be at least 2, got {group_size}; for one response to "
            "each prompt use grpo_advantages(rewards, len(rewards))."
        )
    groups, counted = _groups(rewards, group_size, "batch_scaled_advantages")
    return _rows(_centred(groups, counted)) / (_deviation(_rows(groups), _rows(counted)) + eps)


def normalised_advantages(
    advantages: Float[Array, " B"], rewards: Float[Array, " B"], *, eps: float = 1e-4
) -> Float[Array, " B"]:
    """(A - mean) / (std + ε) over the rows whose reward is a number; 0 for the others.

    TRL's normalize_advantages of RLOO.
    """
    counted = ~jnp.isnan(rewards)
    kept = jnp.where(counted, advantages, 0.0)
    mean = jnp.sum(kept) / jnp.maximum(jnp.sum(counted), 1)
    scaled = (advantages - mean) / (_deviation(kept, counted) + eps)
    return jax.lax.stop_gradient(jnp.where(counted, scaled, 0.0))


def normalised_sum_advantages(
    rewards: Float[Array, "B K"], weights: Float[Array, " K"], group_size: int, *, eps: float = 1e-4
) -> Float[Array, " B"]:
    """Σ_k w_k `grpo_advantages`(r_k), normalised over the batch: no reward drowns another by its scale.

    GDPO: Liu et al., 2026, arxiv.org/abs/2601.05242; TRL's multi_objective_aggregation
    "normalize_then_sum". A NaN is left out of its own reward only; a row of NaNs gets 0.
    """
    chex.assert_shape(weights, (rewards.shape[1],))
    each = [grpo_advantages(column, group_size, eps=eps) for column in rewards.T]
    total = jnp.tensordot(weights, jnp.stack(each), axes=1)
    judged = jnp.where(jnp.all(jnp.isnan(rewards), axis=1), jnp.nan, 0.0)
    return normalised_advantages(total, judged, eps=eps)


def baseline_advantages(
    rewards: Float[Array, " B"], baselines: Float[Array, " B"]
) -> Float[Array, " B"]:
    """r - b, or 0 if either is NaN.

    b may be the reward of a greedy response (ReMax: Li et al., 2023, arxiv.org/abs/2310.10505), a running
    mean, or 0 (Expert Iteration and rejection sampling, with r in {0, 1}).
    """
    chex.assert_equal_shape([rewards, baselines])
    return jax.lax.stop_gradient(jnp.nan_to_num(rewards - baselines))


def whiten(
    values: Float[Array, "*batch"], mask: Bool[Array, "*batch"], *, eps: float = 1e-8
) -> Float[Array, "*batch"]:
    """(x - mean) / sqrt(var + ε) over masked entries, with the unbiased variance; 0 elsewhere."""
    count = jnp.sum(mask)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    centred = jnp.where(mask, values - jnp.sum(values) / jnp.maximum(count, 1), 0.0)
    variance = jnp.sum(centred**2) / jnp.maximum(count - 1, 1)
    return jax.lax.stop_gradient(centred * jax.lax.rsqrt(variance + eps))


def placed_rewards(
    rewards: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    penalties: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """-penalty at every policy token, plus the response's reward at its last policy token.

    Args:
        mask: the policy's own tokens, including the stop token.
        penalties: for example β (old_log_probs - ref_log_probs), the KL in the reward of RLHF.
    """
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    placed = jnp.where(last, rewards[:, None], 0.0)
    if penalties is not None:
        placed = placed - jnp.where(mask, penalties, 0.0)
    return jax.lax.stop_gradient(placed)


def rewards_to_go(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], gamma: float = 1.0
) -> Float[Array, "B T"]:
    """G_t = r_t + γ G_{t+1} over the policy's tokens; other tokens are skipped and get 0."""
    returns, _ = generalised_advantages(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)
    return returns


def reinforce_plus_plus_advantages(
    rewards: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    penalties: Float[Array, "B T"] | None = None,
    *,
    gamma: float = 1.0,
) -> Float[Array, "B T"]:
    """Rewards to go whitened over all policy tokens of the batch.

    REINFORCE++: Hu et al., 2025, arxiv.org/abs/2501.03262. For its variant with a
    baseline, pass `centred_advantages` as the rewards. Rows whose reward is NaN are excluded.
    """
    mask = mask & ~jnp.isnan(rewards)[:, None]
    placed = placed_rewards(jnp.nan_to_num(rewards), mask, penalties)
    return whiten(rewards_to_go(placed, mask, gamma), mask)


def generalised_advantages(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(A, R): δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γ λ A_{t+1}, R_t = A_t + V_t; both 0 off the mask.

    GAE: Schulman et al., 2015, arxiv.org/abs/1506.02438, eq. 16. After the end V and A are 0. t + 1 is the
    policy's next token: tokens of tools or environments in between are skipped without a discount.

    Args:
        rewards: rewards of the policy's tokens (see `placed_rewards`); others are ignored.
        values: V_t, the value of the state in which token t was chosen.
        lam: λ; 1 gives R = the rewards to go, 0 the one-step error.
    """
    chex.assert_equal_shape([rewards, values, mask])
    columns = tuple(x.T for x in (rewards.astype(jnp.float32), values.astype(jnp.float32), mask))
    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    start = (zeros, zeros, jnp.float32(gamma), jnp.float32(gamma * lam))
    _, advantages = jax.lax.scan(_gae_step, start, columns, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    returns = jnp.where(mask, advantages + values, 0.0)
    return jax.lax.stop_gradient((advantages, returns))


def _gae_step(carry, xs):
    # Not a closure over γ and λ: outside of jit, each call would compile the scan again.
    next_value, next_advantage, gamma, gamma_lam = carry
    reward, value, counts = xs
    advantage = reward + gamma * next_value - value + gamma_lam * next_advantage
    value = jnp.where(counts, value, next_value)
    return (value, jnp.where(counts, advantage, next_advantage), gamma, gamma_lam), advantage


def v_trace(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    log_ratios: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: float = 1.0,
    lam: float = 1.0,
    *,
    clip_rho: float = 1.0,
    clip_pg_rho: float = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(A, v): v_t - V_t = ρ_t δ_t + γ c_t (v_{t+1} - V_{t+1}), A_t = ρ'_t (r_t + γ q_{t+1} - V_t).

    V-trace: Espeholt et al., 2018, arxiv.org/abs/1802.01561, eq. 1 and section 4.2, in the form of
    rlax.vtrace_td_error_and_advantage: δ_t = r_t + γ V_{t+1} - V_t, ρ = min(π / μ, ρ̄),
    c = λ min(π / μ, 1), ρ' = min(π / μ, clip_pg_rho), q = λ v + (1 - λ) V. Both are 0 off the mask, and V
    and v after the end. Other tokens are skipped, as in `generalised_advantages`, whose returns with
    λ = 1 are v where π = μ.

    Args:
        log_ratios: log π - log μ, μ the policy that sampled.
        clip_rho: ρ̄; infinity makes π's own value the fixed point, lower bounds have less variance.
    """
    chex.assert_equal_shape([rewards, values, log_ratios, mask])

    def step(carry, xs):
        reward, value, ratio, counts = xs
        next_value, next_error = carry  # V_{t+1}, v_{t+1} - V_{t+1}
        delta = jnp.minimum(ratio, clip_rho) * (reward + gamma * next_value - value)
        error = delta + gamma * lam * jnp.minimum(ratio, 1.0) * next_error
        target = reward + gamma * (next_value + lam * next_error)
        advantage = jnp.minimum(ratio, clip_pg_rho) * (target - value)
        carry = (jnp.where(counts, value, next_value), jnp.where(counts, error, next_error))
        return carry, (advantage, error + value)

    floats = (x.astype(jnp.float32).T for x in (rewards, values, jnp.exp(log_ratios)))
    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    _, found = jax.lax.scan(step, (zeros, zeros), (*floats, mask.T), reverse=True)
    return jax.lax.stop_gradient(tuple(jnp.where(mask, x.T, 0.0) for x in found))


def success_rates(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Mean reward of each row's group, over rows with a verdict; 0 if there are none."""
    groups, counted = _groups(rewards, group_size, "success_rates")
    means = jnp.sum(groups, axis=1, keepdims=True) / jnp.maximum(_count(counted), 1)
    return _rows(jnp.broadcast_to(means, groups.shape))


def has_contrast(rewards: Float[Array, " B"], group_size: int) -> Bool[Array, " Q"]:
    """Returns which groups have two different rewards: the others give no gradient by comparison.

    Dynamic sampling (DAPO: Yu et al., 2025, arxiv.org/abs/2503.14476, section 3.2) keeps these.
    """
    groups, counted = _groups(rewards, group_size, "has_contrast")
    return ~_all_equal(groups, counted)[:, 0]


def _groups(rewards, group_size, name):
    """Returns (rewards [Q, G] with 0 for NaN, mask [Q, G] of those that are not NaN)."""
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{name}: {rewards.shape[0]} rewards are not a multiple of the group size {group_size}."
        )
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32)).reshape(-1, group_size)
    counted = ~jnp.isnan(rewards)
    return jnp.where(counted, rewards, 0.0), counted


def _rows(groups):
    return groups.reshape(-1)


def _deviation(values, counted):
    """The unbiased standard deviation of the counted values [B]."""
    count = jnp.sum(counted)
    mean = jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(counted, (values - mean) ** 2, 0.0))
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


_count = functools.partial(jnp.sum, axis=1, keepdims=True)


def _centred(groups, counted):
    mean = jnp.sum(groups, axis=1, keepdims=True) / jnp.maximum(_count(counted), 1)
    # The mean of equal numbers may have a rounding error, which division by ε would amplify.
    silent = ~counted | _all_equal(groups, counted)
    return jnp.where(silent, 0.0, groups - mean)


def _all_equal(groups, counted):
    highest = jnp.max(jnp.where(counted, groups, -jnp.inf), axis=1, keepdims=True)
    lowest = jnp.min(jnp.where(counted, groups, jnp.inf), axis=1, keepdims=True)
    return highest <= lowest
