"""Several rewards: their weighted sum, and their advantages one by one in a rollout."""

import functools

import jax
import numpy as np
import pytest

from jaxft import rl
from jaxft.objectives import policy_gradient
from jaxft.rewards import Failures, RewardError, SeveralRewards, in_process
from jaxft.rl.advantages import grpo_advantages, normalised_sum_advantages
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, Digits, exact, model_and_params, taken

NAN = float("nan")
FIRST = lambda texts, records: [1.0, NAN, None, 2.0]
SECOND = lambda texts, records: np.array([10.0, 20.0, NAN, NAN])


def test_the_sum_leaves_out_what_has_no_verdict():
    both = SeveralRewards((FIRST, SECOND), (1.0, 0.5))
    np.testing.assert_array_equal(both("abcd", [{}] * 4), np.float32([6, 10, NAN, 2]))
    assert both.parts("abcd", [{}] * 4).shape == (4, 2) and both.failures == Failures()
    counted = lambda *given: FIRST(*given)
    counted.failures = Failures(errors=2, deaths=1)
    assert SeveralRewards((counted, counted), (1, 1)).failures == Failures(0, 4, 2)
    with pytest.raises(RewardError, match="returned 4 rewards for 3 completions"):
        both("abc", [{}] * 3)
    for functions, weights, said in (
        ((), (), "0 reward functions and 0 weights"),
        ((FIRST,), (1.0, 2.0), "1 reward functions and 2 weights"),
        ((FIRST,), (NAN,), "weights must be finite"),
    ):
        with pytest.raises(ValueError, match=said):
            SeveralRewards(functions, weights)


@pytest.mark.parametrize("combination", ["sum_then_normalize", "normalize_then_sum"])
def test_a_rollout_is_credited_with_the_sum_or_with_each(combination):
    """The length of an answer, a hundred times as large, drowns the verifier only in the plain sum."""
    length = lambda texts, records: [100.0 * len(text) for text in texts]
    both, weights = SeveralRewards((in_process(exact), length), (1.0, -0.5)), (1.0, -0.5)
    model, params = model_and_params()
    credit, _ = rl.grpo(functools.partial(policy_gradient, model.forward), 4)
    if combination == "normalize_then_sum":
        credit = rl.normalised_sums(weights, 4)
    kept = []
    keep = lambda batch, params, key: kept.append(batch) or batch
    sample = rl.answers(model, Digits(), both, SAMPLING, 4)
    prompts = rl.Prompts(PROMPTS, 4, RECORDS)
    (batch,) = taken(rl.collect(prompts, sample, credit, keep), params)
    parts = jax.numpy.asarray(kept[0]["reward_parts"])
    sums = parts @ jax.numpy.asarray(weights)
    wanted = grpo_advantages(sums, 4)
    if combination == "normalize_then_sum":
        wanted = normalised_sum_advantages(parts, jax.numpy.asarray(weights), 4)
    assert np.ptp(parts[:, 1]) > 0
    np.testing.assert_allclose(batch["advantages"], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch["stats"]["reward"], sums, rtol=1e-5)
    np.testing.assert_array_equal(batch["stats"]["reward_2"], parts[:, 1])
    assert "reward_parts" not in batch


def test_a_reward_that_single_ones_do_not_contain_is_refused():
    credit = rl.normalised_sums((1.0, 1.0), 2)
    parts = np.float32([[1, 2], [3, NAN]])
    sums = np.float32([3, 3])
    assert np.isfinite(credit(sums, {"reward_parts": parts})["advantages"]).all()
    with pytest.raises(ValueError, match="rewards were changed after they were added"):
        credit(sums - 0.5, {"reward_parts": parts})
    with pytest.raises(ValueError, match=r"reward_parts \(\) for 2 weights; pass SeveralRewards"):
        credit(sums, {})
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        rl.normalised_sums((1.0,), 1)
