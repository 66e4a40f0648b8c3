"""V-trace against its sum over later tokens, and advantages of several rewards against TRL's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.rl import advantages as adv


def by_the_sum(r, v, ratio, gamma, lam, clip_rho, clip_pg_rho):
    """Eq. 1 of the paper, not its recursion, in float64, for a row without other tokens."""
    size = len(r)
    after = np.append(v, 0.0)
    delta = np.minimum(ratio, clip_rho) * (r + gamma * after[1:] - v)
    trace = lam * np.minimum(ratio, 1.0)
    target = np.append(v, 0.0)
    for s in range(size):
        for t in range(s, size):
            target[s] += gamma ** (t - s) * np.prod(trace[s:t]) * delta[t]
    q = lam * target[1:] + (1 - lam) * after[1:]
    return np.minimum(ratio, clip_pg_rho) * (r + gamma * q - v), target[:size]


@pytest.mark.parametrize(
    "gamma, lam, rho, pg_rho", [(0.9, 0.8, 1.0, 1.0), (1.0, 1.0, 1.3, 0.7), (0.95, 0.0, 2.0, 1.0)]
)
def test_v_trace_is_the_sum_of_the_paper_and_skips_other_tokens(gamma, lam, rho, pg_rho):
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]], bool)
    rewards, values, log_ratios = rng.normal(size=(3, 2, 7))
    v_trace = jax.jit(
        adv.v_trace, static_argnums=(4, 5), static_argnames=("clip_rho", "clip_pg_rho")
    )
    given = jnp.asarray(np.stack([rewards, values, log_ratios]), jnp.float32)
    found = v_trace(*given, jnp.asarray(mask), gamma, lam, clip_rho=rho, clip_pg_rho=pg_rho)
    for row in range(2):
        kept = mask[row]
        known = (rewards[row, kept], values[row, kept], np.exp(log_ratios[row, kept]))
        wanted = by_the_sum(*known, gamma, lam, rho, pg_rho)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(got)[row, kept], want, rtol=1e-4, atol=1e-5)
            assert not np.asarray(got)[row, ~kept].any()


def test_scales_of_a_batch_are_those_of_trl():
    """The formulas of TRL's GRPOTrainer and RLOOTrainer in numpy, a reward of NaN left out."""
    rewards = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32) * [1, 30]
    rewards[4, 0] = rewards[7] = np.nan
    first = rewards[:, 1].astype(np.float32)
    std = lambda x, axis=None: np.nanstd(x, axis=axis, ddof=1, keepdims=axis is not None)
    centred = lambda x: x - np.nanmean(x, axis=1, keepdims=True)
    batch = centred(first.reshape(3, 4)).reshape(-1) / (std(first) + 1e-4)
    close = lambda got, want: np.testing.assert_allclose(
        got, np.nan_to_num(want), rtol=1e-4, atol=1e-5
    )
    close(adv.batch_scaled_advantages(jnp.asarray(first), 4), batch)

    loo = adv.leave_one_out_advantages(jnp.asarray(first), 4)
    kept = np.where(np.isnan(first), np.nan, np.asarray(loo, np.float64))
    scaled = (kept - np.nanmean(kept)) / (std(kept) + 1e-4)
    close(adv.normalised_advantages(loo, jnp.asarray(first)), scaled)

    weights = np.array([1.0, 0.5], np.float32)
    grouped = rewards.reshape(3, 4, 2)
    each = (centred(grouped) / (std(grouped, 1) + 1e-4)).reshape(12, 2)
    total = np.nansum(each * weights, axis=1)
    total[7] = np.nan
    wanted = (total - np.nanmean(total)) / (std(total) + 1e-4)
    several = jnp.asarray(rewards, jnp.float32), jnp.asarray(weights)
    close(adv.normalised_sum_advantages(*several, 4), wanted)
