"""A teacher's log-probs of rollouts, and their difference from the policy's as credit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.objectives import completion_log_probs, policy_gradient
from jaxft.rewards import in_process
from jaxft.rl.rollouts import model_inputs
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, Digits, exact, model_and_params, taken

REWARDS = jnp.array([1.0, 0.0])
MASK = np.array([[True, True, False], [True, True, True]])
BATCH = {
    "completion_mask": MASK,
    "sampler_log_probs": np.full((2, 3), -9.0),
    "old_log_probs": np.array([[-1.0, -2.0, 0.0], [-0.5, -1.0, -3.0]]),
    "teacher_log_probs": np.array([[-0.5, -3.0, -4.0], [-0.5, -0.2, -1.0]]),
}
GAIN = np.array([[0.5, -1.0, 0.0], [0.0, 0.8, 2.0]])


def base_credit(rewards, batch):
    return {"advantages": 4.0 * rewards, "kept": rewards}


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_credit_is_the_log_ratio_of_each_token_and_the_rest_of_the_advantage(weight):
    found = rl.reverse_kl_credit(rl.reads_kl_weight(base_credit), weight)(REWARDS, BATCH)
    wanted = weight * GAIN + (1 - weight) * 4.0 * np.array([[1.0] * 3, [0.0] * 3])  # 0 off the mask
    np.testing.assert_allclose(found["advantages"], wanted, atol=1e-6)
    assert "kept" in found and rl.reverse_kl_credit(base_credit).reads_kl_weight
    # Without the old policy's log-probs, the sampler's are its.
    own = {n: x for n, x in BATCH.items() if n != "old_log_probs"} | {
        "sampler_log_probs": BATCH["old_log_probs"]
    }
    again = rl.reverse_kl_credit(base_credit, weight)(REWARDS, own)
    np.testing.assert_allclose(again["advantages"], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "credit, batch, weight, message",
    [
        (base_credit, {}, 1.5, "weight must be above 0 and at most 1, got 1.5"),
        (base_credit, {}, 1.0, "no teacher_log_probs; pass add_teacher"),
        (lambda *_: {"correct": 1}, BATCH, 1.0, r"gives \['correct'\] instead of advantages"),
    ],
)
def test_what_has_no_such_credit_is_refused(credit, batch, weight, message):
    with pytest.raises(ValueError, match=message):
        rl.reverse_kl_credit(credit, weight)(REWARDS, batch)


def test_a_rollout_scored_by_a_teacher_is_credited_with_its_log_probs():
    model, params = model_and_params()
    teacher = jax.tree.map(lambda x: 1.5 * x, params)
    credit, _ = rl.grpo(functools.partial(policy_gradient, model.forward), 2)
    sample = rl.answers(model, Digits(), in_process(exact), SAMPLING, 2)
    prompts = rl.Prompts(PROMPTS, 2, RECORDS)
    score = rl.add_teacher(model.forward, teacher, 1.0)
    collect = rl.collect(prompts, sample, rl.reverse_kl_credit(credit), score)
    (batch,) = taken(collect, params)
    wanted = completion_log_probs(model.forward, teacher, model_inputs(batch))
    mask, old = batch["completion_mask"], batch["sampler_log_probs"]
    np.testing.assert_allclose(batch["teacher_log_probs"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch["advantages"], np.where(mask, wanted - old, 0), atol=1e-5)
    assert "ref_log_probs" not in batch
