"""Experience made on the device: rewards of tokens, several updates, a reference, plain samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.rl.advantages import grpo_advantages
from tests.rl.rl_task import PROMPTS, SAMPLING, STOP, TARGETS, model_and_params, taken

CREDIT = lambda rewards, batch: {"advantages": grpo_advantages(rewards, len(rewards) // 2)}


def test_equals_is_a_loop_over_rows():
    reward = rl.equals(TARGETS, 3)
    rows = [[0, STOP, 0], [0, 0, STOP], [1, STOP, 5], [2, 3, 4], [3, STOP, 9]]
    masks = [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    numbers = [0, 0, 2, 2, 3]
    got = reward(jnp.array(rows), jnp.array(masks, bool), jnp.array(numbers))
    given = [
        [t for t, m in zip(r, ms, strict=True) if m] for r, ms in zip(rows, masks, strict=True)
    ]
    assert (
        got.tolist()
        == [float(g == TARGETS[n]) for g, n in zip(given, numbers, strict=True)]
        == [1, 0, 0, 0, 0]
    )


def test_updates_share_a_rollout_and_know_old_and_reference():
    model, params = model_and_params()
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    seen = []

    def reward(tokens, mask, numbers):
        jax.debug.callback(lambda n: seen.append(np.asarray(n)), numbers)
        return jnp.where(mask, tokens, 0).sum(axis=1) * 1.0

    batches = rl.collect_on_device(
        model, rl.Prompts(PROMPTS, 2), reward, CREDIT, SAMPLING,
        group_size=4, updates=2, ref_params=moved,
    )  # fmt: skip
    whole = taken(batches, params, 2)
    jax.effects_barrier()
    # One rollout for both; its rows are of two prompts, a group of four each.
    assert len(seen) == 1 and [len(set(g)) for g in seen[0].reshape(2, 4).tolist()] == [1, 1]
    rows = {
        k: np.stack([b[k] for b in whole], axis=1).reshape(8, -1) for k in whole[0] if k != "stats"
    }
    assert [PROMPTS[i] for i in seen[0]] == rows["tokens"][:, :2].tolist()
    value = np.where(rows["completion_mask"], rows["tokens"][:, 2:], 0).sum(axis=1)
    np.testing.assert_allclose(
        rows["advantages"][:, 0], grpo_advantages(jnp.asarray(value * 1.0), 4), atol=1e-5
    )
    for name, theirs in (("old_log_probs", params), ("ref_log_probs", moved)):
        np.testing.assert_allclose(
            rows[name], rl.policy_log_probs(model.forward, theirs, rows), atol=1e-5
        )
    # Without its updates' scores, the sampler's are the old policy's.
    np.testing.assert_allclose(rows["old_log_probs"], rows["sampler_log_probs"], atol=1e-4)


def test_samples_for_evaluation_follow_the_policy():
    model, params = model_and_params()
    tokens, mask = rl.sample_on_device(
        model, params, PROMPTS, jax.random.key(3), SAMPLING, samples=2000
    )
    assert tokens.shape == mask.shape == (4, 2000, 3) and mask[..., 0].all()
    logits = model.apply({"params": params}, jnp.array(PROMPTS)).logits[:, -1]
    wanted = np.asarray(jax.nn.softmax(logits))
    share = np.stack([(tokens[..., 0] == v).mean(axis=1) for v in range(8)], axis=1)
    assert np.abs(share - wanted).max() < 0.045  # four standard deviations
    assert not mask[..., 1:][np.repeat(tokens[..., :1] == STOP, 2, axis=-1)].any()


def test_rows_that_updates_do_not_divide_are_refused():
    model, params = model_and_params()
    batches = rl.collect_on_device(
        model, rl.Prompts(PROMPTS, 2), rl.equals(TARGETS, 3), CREDIT, SAMPLING,
        group_size=2, updates=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="4 responses cannot be split over 3 updates"):
        taken(batches, params)


def test_success_is_the_share_of_right_samples():
    reward = rl.equals(TARGETS, 3)
    answer = lambda target: [*target, *[0] * (3 - len(target))]
    right, mask = answer(TARGETS[2]), [i < len(TARGETS[2]) for i in range(3)]
    tokens = np.array([[right, [9, 9, 9], right, right], [[9, 9, 9]] * 4])
    masks = np.array([[mask] * 4, [[True] * 3] * 4])
    sample = lambda count: (tokens[:, :count], masks[:, :count])
    assert rl.estimate_success(sample, reward, [2, 0], 4).tolist() == [0.75, 0.0]
    assert rl.estimate_success(sample, reward, [2, 0], 2).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="5 samples of 2 prompts are expected, got \\(2, 4\\)"):
        rl.estimate_success(sample, reward, [2, 0], 5)
