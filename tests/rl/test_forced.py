"""Answers after prefixes: likelihoods from one cache against whole forward passes and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient
from jaxft.rl import forced
from jaxft.rl.prompts import Asked
from tests.rl.rl_task import PROMPTS, SAMPLING, STOP, model_and_params, taken
from tests.small_models import GEMMA, start

FORCED = [5, 6]
LONG = SamplingConfig(max_new_tokens=8, stop_ids=(STOP,))
ANY = Asked(PROMPTS, [{}] * 4)


def reward_even(batch):
    """1 for answers with an even sum."""
    size = batch["completion_mask"].shape[1]
    totals = np.where(batch["completion_mask"], batch["tokens"][:, -size:], 0).sum(axis=1)
    return (totals % 2 == 0).astype(np.float32)


def sampled(config=LONG, group_size=2):
    model, _ = model_and_params()

    def sample(params, asked, key):
        batch, _ = rl.sample_groups(
            model, params, asked.ids, key, config, group_size, columns=asked.columns
        )
        return batch | {"rewards": reward_even(batch)}

    return sample


def has_finite_gradients(grads):
    grads = jax.tree.leaves(grads)
    return all(np.isfinite(g).all() for g in grads) and any(np.any(g != 0) for g in grads)


def by_hand(model, params, batch, ends, forced_ids):
    """Each prefix in a row by itself, left-padded, without a cache."""
    width, count = 14, batch["gold"].shape[1]
    tokens, seen, mask = (np.zeros((ends.size, width), np.int32) for _ in range(3))
    for n, (i, j) in enumerate(np.ndindex(*ends.shape)):
        (prefix,) = forced.prefixes_of(batch, [i], [max(ends[i, j], 0)])
        gold = [t for t in batch["gold"][i].tolist() if t >= 0]
        ids = [*prefix, *forced_ids, *gold]
        tokens[n, -len(ids) :], seen[n, -len(ids) :], mask[n, -len(gold) :] = ids, 1, 1
    rows = {"tokens": tokens, "segment_ids": seen, "completion_mask": mask[:, -count:].astype(bool)}
    rows |= {"positions": np.maximum(np.cumsum(seen, axis=1) - 1, 0)}
    found = rl.policy_log_probs(model.forward, params, rows, 1.0)
    return np.asarray(found).sum(axis=1).reshape(ends.shape)


@pytest.mark.parametrize("config", [None, GEMMA], ids=["llama", "gemma"])
def test_likelihoods_from_one_cache_are_those_of_whole_rows(config):
    if config is None:
        model, params = model_and_params()
    else:
        model = Decoder(config)
        params = start(model)
    rng = np.random.default_rng(0)
    seen = np.array([[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    batch = {
        "tokens": rng.integers(0, 7, seen.shape).astype(np.int32),
        "segment_ids": seen,
        "completion_mask": seen[:, 3:].astype(bool),
        "gold": np.array([[3, STOP, -1], [1, 2, STOP], [4, STOP, -1]], np.int32),
    }
    ends = np.array([[0, 2, 4], [0, 3, -1], [0, 1, -1]], np.int32)
    chances = rl.exact_chances(model, FORCED)(batch, ends, params, None)
    there = ends >= 0
    expected = np.exp(by_hand(model, params, batch, ends, FORCED))
    np.testing.assert_allclose(np.asarray(chances)[there], expected[there], rtol=2e-4)
    assert np.isnan(np.asarray(chances)[~there]).all()


def test_samples_agree_with_the_likelihood():
    model, params = model_and_params()
    row = np.array([[*PROMPTS[0], 3, 4, 0]])
    batch = {
        "tokens": row,
        "segment_ids": np.array([[1, 1, 1, 1, 0]]),
        "completion_mask": np.array([[True, True, False]]),
        "gold": np.array([[2, STOP]], np.int32),
    }
    ends = np.array([[0, 1]], np.int32)

    def judge(completions, rows, batch):
        return [
            ids == batch["gold"][row].tolist() for ids, row in zip(completions, rows, strict=True)
        ]

    count, config = 2000, SamplingConfig(max_new_tokens=2, stop_ids=(STOP,))
    exact = np.asarray(rl.exact_chances(model, FORCED)(batch, ends, params, None))
    estimate = rl.sampled_chances(model, judge, FORCED, config, count)
    got = estimate(batch, ends, params, jax.random.key(0))
    assert (np.abs(got - exact) < 3 * np.sqrt(exact * (1 - exact) / count)).all() and (
        got > 0
    ).all()


def test_chances_are_added_to_experience_and_prefixes_lie_within():
    model, params = model_and_params()
    gold = np.array([[i, STOP] for i in range(4)], np.int32)
    prompts = rl.Prompts(PROMPTS, 2, columns={"gold": gold})
    ends = functools.partial(rl.separator_ends, separator=3, most=4)
    add = rl.add_chances(ends, rl.exact_chances(model, FORCED))
    algorithm = rl.mrt_online(functools.partial(policy_gradient, model.forward), 2)
    (batch,) = taken(rl.collect(prompts, sampled(), algorithm.credit, add), params)
    assert batch["episode_ends"].shape == batch["answer_chances"].shape == (4, 5)
    assert batch["advantages"].shape == batch["completion_mask"].shape
    slopes = jax.jit(jax.value_and_grad(algorithm.objective, has_aux=True))
    (loss, metrics), grads = slopes(params, batch, None)
    assert np.isfinite(loss) and metrics["progress"].weight == 4
    assert has_finite_gradients(grads)
    beyond = rl.add_chances(lambda batch: np.full((4, 2), 9), rl.exact_chances(model, FORCED))
    with pytest.raises(ValueError, match="but a prefix ends at token 9"):
        beyond(batch, params, None)


def test_half_of_a_group_must_answer_and_prefixes_have_no_gradient():
    model, params = model_and_params()
    prefixes = [[*ids, 1, 2, 3][: 2 + i] for i, ids in enumerate(PROMPTS)]
    both = rl.with_terminations(sampled(SAMPLING, 2), FORCED)
    asked = ANY._replace(ids=prefixes, columns={"gold": np.arange(8).reshape(4, 2)})
    batch = both(params, asked, jax.random.key(1))
    assert batch["terminated"].tolist() == [False, False, True, True] * 4
    assert batch["gold"][:, 0].tolist() == np.repeat([0, 2, 4, 6], 4).tolist()
    size = batch["completion_mask"].shape[1]
    starts = forced.prefixes_of(batch, range(16), [0] * 16)
    for row, ids in enumerate(starts):
        assert ids == prefixes[row // 4] + (FORCED if row % 4 > 1 else [])
    np.testing.assert_array_equal(batch["rewards"], reward_even(batch))
    # The loss does not change if tokens of prompts are other columns' targets: only N columns have a loss.
    algorithm = rl.mrt_stale(functools.partial(policy_gradient, model.forward), 4)
    credited = batch | algorithm.credit(jnp.asarray(batch["rewards"]), batch)

    def scaled_loss(params, offset):
        """The loss with a scale of each hidden state."""

        def forward(p, b, key=None):
            output = model.forward(p, b)
            return output.replace(hidden=output.hidden * (1 + offset)[..., None])

        scaled = rl.mrt_stale(functools.partial(policy_gradient, forward), 4)
        return scaled.objective(params, credited, None)[0]

    slopes = jax.jit(jax.grad(scaled_loss, argnums=(0, 1)))
    grads, gradient = slopes(params, jnp.zeros(batch["tokens"].shape))
    assert has_finite_gradients(grads)
    gradient = np.asarray(gradient)
    # The hidden state of position t predicts token t + 1.
    own = np.zeros(gradient.shape, bool)
    own[:, -size - 1 : -1] = credited["completion_mask"]
    assert not gradient[~own].any() and gradient[own].any()


def test_bad_settings_are_refused():
    model, _ = model_and_params()
    with pytest.raises(ValueError, match="branches must be at least 1, got 0"):
        rl.sampled_chances(model, None, FORCED, SAMPLING, 0)
    with pytest.raises(ValueError, match="temperature=0 is greedy"):
        rl.sampled_chances(model, None, FORCED, SamplingConfig(temperature=0.0), 4)
    with pytest.raises(ValueError, match="forced must have at least one token"):
        rl.exact_chances(model, [])
