"""Advantages of some answers of a group: worked numbers, limiting cases and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.rl.advantages import centred_advantages, grpo_advantages


def random_rewards(groups=5, size=4):
    rewards = np.random.default_rng(0).random(groups * size).astype(np.float32)
    rewards[:size] = 0.5  # a group without contrast
    rewards[size] = np.nan
    return jnp.asarray(rewards)


def test_all_kept_is_grpo_and_fewer_are_the_largest():
    rewards = random_rewards()
    whole = grpo_advantages(rewards, 4)
    np.testing.assert_array_equal(rl.largest_advantages(4)(rewards, 4), whole)
    found = np.asarray(rl.largest_advantages(2)(rewards, 4)).reshape(-1, 4)
    for row, full in zip(found, np.asarray(whole).reshape(-1, 4), strict=True):
        kept = np.argsort(-np.abs(full), kind="stable")[:2]
        expected = np.zeros(4, np.float32)
        expected[kept] = 2 * full[kept]
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        rl.largest_advantages(0)
    with pytest.raises(ValueError, match="more than the group size 4"):
        rl.largest_advantages(5)(rewards, 4)


def test_gpg_scales_by_the_rows_that_differ():
    rewards = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    expected = 12 / 4 * np.array([0.75, -0.25, -0.25, -0.25, *[0] * 8])
    np.testing.assert_allclose(rl.gpg_advantages(rewards, 4), expected)
    np.testing.assert_array_equal(rl.gpg_advantages(jnp.ones(8), 4), np.zeros(8))
    mixed = random_rewards(4)[4:]  # Every group differs: α = 1.
    np.testing.assert_allclose(rl.gpg_advantages(mixed, 4), centred_advantages(mixed, 4))


def test_pass_at_k_credits_what_the_best_answer_adds():
    nan = float("nan")
    rewards = [1.0, 0, 0, 0, 1, 1, 0, 0, 0.2, 0.9, nan, 0.5, 0.5, nan, nan, nan]
    expected = [1.0, 0, 0, 0, *[0] * 4, 0, 0.4, 0, 0, *[0] * 4]
    np.testing.assert_allclose(rl.pass_at_k_advantages(jnp.array(rewards), 4), expected, atol=1e-6)
    # The sum over a group is E[max] - E[max without the best], by definition.
    some = np.random.default_rng(1).random((6, 4)).astype(np.float32)
    found = np.asarray(rl.pass_at_k_advantages(jnp.asarray(some.reshape(-1)), 4)).reshape(6, 4)
    without = np.sort(some, axis=1)[:, :-1].max(axis=1)
    np.testing.assert_allclose(found.sum(axis=1), some.max(axis=1) - without, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 2 and divide 4"):
        rl.pass_at_k_advantages(jnp.ones(4), 1)
