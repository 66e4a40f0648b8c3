"""Advantages against worked examples, slow loops and limits."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxft.rl import advantages as adv
from jaxft.rl import best_and_worst

ONE_RIGHT = jnp.array([1.0, 0.0, 0.0, 0.0])
TWO_RIGHT = jnp.array([1.0, 0.0, 0.0, 1.0])


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance)


def test_worked_examples():
    close(adv.grpo_advantages(TWO_RIGHT, 4), 0.865875 * np.array([1, -1, -1, 1]))
    close(adv.leave_one_out_advantages(TWO_RIGHT, 4), np.array([2, -2, -2, 2]) / 3)
    close(adv.centred_advantages(TWO_RIGHT, 4), [0.5, -0.5, -0.5, 0.5])
    close(adv.grpo_advantages(ONE_RIGHT, 4), [1.4997] + [-0.4999] * 3, 1e-4)
    close(adv.leave_one_out_advantages(ONE_RIGHT, 4), [1] + [-1 / 3] * 3)
    close(adv.baseline_advantages(ONE_RIGHT, jnp.full(4, 0.25)), [0.75] + [-0.25] * 3)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_groups_equal_a_slow_loop_with_verdicts_missing(group_size):
    rewards = np.random.default_rng(0).normal(size=24).astype(np.float32)
    rewards[[1, 7, 8]] = np.nan
    grpo, centred, rloo = np.zeros((3, 24))
    for start in range(0, 24, group_size):
        rows = [i for i in range(start, start + group_size) if not np.isnan(rewards[i])]
        for i in rows:
            others = [rewards[j] for j in rows if j != i]
            if not others:
                continue
            centred[i] = rewards[i] - np.mean(rewards[rows])
            grpo[i] = centred[i] / (np.std(rewards[rows], ddof=1) + 1e-4)
            rloo[i] = rewards[i] - np.mean(others)
    rewards = jnp.asarray(rewards)
    close(jax.jit(adv.grpo_advantages, static_argnums=1)(rewards, group_size), grpo)
    close(adv.centred_advantages(rewards, group_size), centred)
    close(adv.leave_one_out_advantages(rewards, group_size), rloo)


def test_degenerate_groups_are_defined():
    same = jnp.full(6, 0.1)
    for function in (adv.grpo_advantages, adv.centred_advantages, adv.leave_one_out_advantages):
        assert not function(same, 3).any()
        assert not function(jnp.full(6, jnp.nan), 3).any()
        shuffled = function(jnp.array([3.0, 1.0, 2.0]), 3)
        close(shuffled, function(jnp.array([1.0, 2.0, 3.0]), 3)[jnp.array([2, 0, 1])])
    # One response a group: no baseline.
    close(adv.grpo_advantages(TWO_RIGHT, 1), TWO_RIGHT)
    close(adv.centred_advantages(TWO_RIGHT, 1), TWO_RIGHT)
    mixed = jnp.array([1, 1, 0, jnp.nan, jnp.nan, 0.0])
    close(adv.has_contrast(mixed, 2), [False, False, False])
    close(adv.has_contrast(mixed, 3), [True, False])
    close(adv.success_rates(mixed, 3), [2 / 3] * 3 + [0.0] * 3)


def test_bad_groups_are_errors():
    with pytest.raises(ValueError, match="4 rewards are not a multiple of the group size 3"):
        adv.grpo_advantages(TWO_RIGHT, 3)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        adv.leave_one_out_advantages(TWO_RIGHT, 1)


def test_gae_and_whitening_of_a_worked_example():
    rewards, values = jnp.array([[0.0, 0, 1]]), jnp.array([[0.2, 0.4, 0.6]])
    mask = jnp.ones((1, 3), bool)
    advantages, returns = adv.generalised_advantages(rewards, values, mask)
    close(advantages, [[0.751, 0.58, 0.4]])
    close(returns, [[0.951, 0.98, 1.0]])
    close(adv.whiten(advantages, mask), [[0.991344, 0.017092, -1.008436]])
    # A tool's token in between, with any value and reward, changes nothing for the policy's.
    mask = jnp.array([[True, False, True, True]])
    insert = lambda x, v: jnp.insert(x, 1, v, axis=1)
    wide, _ = adv.generalised_advantages(insert(rewards, 5.0), insert(values, 9.0), mask)
    close(wide, insert(advantages, 0.0))


def test_gae_equals_a_slow_loop_and_its_limits(key):
    rewards, values = jax.random.normal(key, (2, 4, 9))
    lengths = np.array([9, 5, 1, 0])
    mask = jnp.arange(9)[None] < lengths[:, None]
    for gamma, lam in ((0.9, 0.8), (1.0, 1.0), (1.0, 0.0)):
        got, returns = adv.generalised_advantages(rewards, values, mask, gamma, lam)
        wanted = np.zeros((4, 9))
        for i, length in enumerate(lengths):
            for t in range(length):
                for u in range(t, length):
                    after = values[i, u + 1] if u + 1 < length else 0.0
                    delta = rewards[i, u] + gamma * after - values[i, u]
                    wanted[i, t] += (gamma * lam) ** (u - t) * delta
        close(got, wanted)
    to_go = adv.rewards_to_go(rewards, mask)
    close(to_go[0], np.cumsum(np.asarray(rewards[0])[::-1])[::-1])
    advantages, returns = adv.generalised_advantages(rewards, values, mask, 1.0, 1.0)
    close(returns, to_go)
    close(advantages, jnp.where(mask, to_go - values, 0.0))


def test_reinforce_plus_plus_is_whitened_rewards_to_go():
    mask = jnp.array([[True, True, False, True], [True, False, False, False], [True] * 4])
    rewards = jnp.array([1.0, 0.0, jnp.nan])
    placed = adv.placed_rewards(rewards[:2], mask[:2], jnp.full((2, 4), 0.1))
    close(placed, [[-0.1, -0.1, 0, 0.9], [-0.1, 0, 0, 0]])
    got = adv.reinforce_plus_plus_advantages(rewards, mask, jnp.full((3, 4), 0.1))
    returns = np.array([0.7, 0.8, 0.9, -0.1])
    wanted = (returns - returns.mean()) / returns.std(ddof=1)
    close(got[0], [wanted[0], wanted[1], 0, wanted[2]])
    close(got[1:], [[wanted[3], 0, 0, 0], [0] * 4])
    # Without KL, an outcome reward whitened over tokens: REINFORCE with the batch's mean.
    assert not adv.reinforce_plus_plus_advantages(jnp.full(3, jnp.nan), mask).any()


def test_no_gradient_flows_through_advantages():
    for function in (adv.grpo_advantages, adv.centred_advantages, adv.leave_one_out_advantages):
        chex.assert_trees_all_equal(
            jax.grad(lambda r, f=function: jnp.sum(f(r, 2) ** 2))(TWO_RIGHT), jnp.zeros(4)
        )


def test_shapes_of_signatures_are_checked_here():
    with pytest.raises(jaxtyping.TypeCheckError, match="grpo_advantages"):
        adv.grpo_advantages(jnp.ones((2, 2)), 2)
    with pytest.raises(jaxtyping.TypeCheckError, match="best_and_worst"):
        best_and_worst(jnp.ones(4), 2, counted=jnp.ones(3, bool))
