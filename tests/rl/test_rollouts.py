"""Experience: what is sampled, how it is laid out, and that a policy learns from it."""

import collections
import contextlib
import dataclasses
import functools
import logging
import re
import types

import jax
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.objectives import policy_gradient
from jaxft.rewards import in_process
from jaxft.rl.advantages import grpo_advantages
from jaxft.train import fit
from tests.rl.rl_task import (
    PROMPTS,
    RECORDS,
    SAMPLING,
    STOP,
    TARGETS,
    Digits,
    exact,
    model_and_params,
)

ONE_TOKEN = SamplingConfig(max_new_tokens=1)
CREDIT = lambda rewards, batch: {"advantages": grpo_advantages(rewards, 4)}


def state_at(step, params, seed=0):
    return types.SimpleNamespace(step=step, params=params, key=jax.random.key(seed))


def collector(rewards=None, credit=CREDIT, **settings):
    model, _ = model_and_params()
    settings = dict(prompts_per_step=2, group_size=4) | settings
    rewards = in_process(exact) if rewards is None else rewards
    return rl.collect(model, PROMPTS, RECORDS, Digits(), rewards, credit, SAMPLING, **settings)


def by_length(completions, records):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("temperature, top_k", [(0.7, None), (1.0, 3)])
def test_the_trainer_agrees_with_the_sampler(temperature, top_k):
    model, params = model_and_params()
    prompts = [[1], [1, 2, 3, 4, 5], [3] * 20]
    config = SamplingConfig(40, temperature, top_k=top_k, stop_ids=(STOP,))
    batch, completions = rl.sample_groups(model, params, prompts, jax.random.key(1), config, 2)
    rows, size = batch["completion_mask"].shape
    assert rows == 6
    for i in range(rows):
        seen = batch["segment_ids"][i] > 0
        assert batch["tokens"][i][seen].tolist() == prompts[i // 2] + completions[i]
        assert batch["positions"][i][seen].tolist() == list(range(seen.sum()))
        response = batch["tokens"][i, -size:][batch["completion_mask"][i]]
        assert response.tolist() == completions[i]
        assert batch["truncated"][i] == (completions[i][-1] != STOP)
    scored = rl.score(model.forward, params, batch, temperature)
    assert np.abs(scored - batch["sampler_log_probs"]).max() < 1e-4
    behaviour, full = batch["behaviour_log_probs"], batch["sampler_log_probs"]
    # What top-k keeps has less than all of the mass.
    assert (behaviour == full).all() if top_k is None else (behaviour > full + 1e-3).any()


@contextlib.contextmanager
def compiled():
    """How often programs of each name are compiled meanwhile."""
    found, handler, log = collections.Counter(), logging.Handler(), logging.getLogger("jax")
    said = lambda record: re.match(r"Compiling jit\((\w+)\)", record.getMessage())
    handler.emit = lambda record: found.update(said(record).groups() if said(record) else ())
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "handlers", [handler])
        patch.setattr(log, "propagate", False)
        yield found


def test_fifty_mixed_batches_compile_once_a_bucket():
    """7 or 8 prompts of 1 to 24 tokens, 2 or 3 answers to each: two widths, one bucket of rows."""
    model, params = model_and_params()
    rng, config = np.random.default_rng(0), dataclasses.replace(SAMPLING, max_new_tokens=20)
    shapes = set()
    with compiled() as found:
        for i in range(50):
            longest, count, group = (int(rng.integers(*ends)) for ends in ((1, 25), (7, 9), (2, 4)))
            lengths = [longest, *rng.integers(1, longest + 1, count - 1)]
            prompts = [rng.integers(0, 6, n).tolist() for n in lengths]
            key = jax.random.key(i)
            batch, _ = rl.sample_groups(model, params, prompts, key, config, group)
            shapes.add((longest, count, group))
            if (count, group) == (8, 2):
                rl.score(model.forward, params, batch)
    assert len(shapes) > 30
    # Of responses, score sees two buckets: 16 and the limit. The rest is small: keys, flags of rows.
    most = {"prefill": 2, "fork": 4, "_decode": 4, "completion_log_probs": 4}
    assert not {name: n for name, n in found.items() if n > most.get(name, 8)}
    assert {"prefill", "_decode"} <= set(found)


def test_experience_follows_from_the_state_alone():
    _, params = model_and_params()
    first, again = collector(), collector()
    one, two = first(state_at(0, params)), first(state_at(1, params))
    for got, wanted in ((again(state_at(1, params)), two), (again(state_at(0, params)), one)):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    other = again(state_at(1, params, seed=1))
    assert any((other["tokens"] != two["tokens"]).ravel())
    # Four prompts, two at a time: an epoch has each once.
    asked = lambda batch: {tuple(row[:16][-2:]) for row in batch["tokens"].tolist()}
    assert asked(one) | asked(two) == {tuple(prompt) for prompt in PROMPTS}


def test_several_updates_share_a_rollout():
    _, params = model_and_params()
    batches = collector(by_length, updates=2)
    one, two = batches(state_at(4, params)), batches(state_at(5, None))
    whole = collector(by_length)(state_at(2, params))
    assert len(one["tokens"]) == len(two["tokens"]) == 4
    np.testing.assert_array_equal(one["advantages"], whole["advantages"][0::2])
    np.testing.assert_array_equal(two["tokens"], whole["tokens"][1::2])
    gap = np.abs(two["old_log_probs"] - two["sampler_log_probs"])
    assert gap.max() < 1e-4 and "old_log_probs" not in whole


def test_rewards_are_checked_and_missing_ones_defined():
    _, params = model_and_params()
    state = state_at(0, params)
    with pytest.raises(ValueError, match=r"gave \(3,\) rewards for 8 completions"):
        collector(lambda completions, records: [1.0, 2.0, 3.0])(state)
    with pytest.raises(ValueError, match="infinite reward"):
        collector(lambda completions, records: [np.inf] * 8)(state)
    batch = collector(lambda completions, records: [None, 1, 0, 0] + [np.nan] * 4)(state)
    assert batch["stats"]["unscored"].tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
    assert batch["stats"]["no_contrast"].tolist() == [0] * 4 + [1] * 4
    assert batch["advantages"][0] == 0 and not batch["advantages"][4:].any()
    assert batch["advantages"][1] > 0


def test_sizes_and_greedy_sampling_are_errors():
    with pytest.raises(ValueError, match="cannot be split over 3"):
        collector(updates=3)
    model, params = model_and_params()
    with pytest.raises(ValueError, match="temperature=0 is greedy"):
        rl.sample_groups(model, params, PROMPTS, jax.random.key(0), SamplingConfig(3, 0.0), 2)
    with pytest.raises(ValueError, match="3 prompts for 4 records"):
        rl.collect(
            model, PROMPTS[:3], RECORDS, Digits(), by_length, CREDIT, SAMPLING,
            prompts_per_step=2, group_size=4,
        )  # fmt: skip


def test_truncated_responses_leave_the_loss_but_not_the_baseline():
    _, params = model_and_params()
    penalty = lambda lengths: -1.0 * (lengths >= 3)
    plain = collector(by_length)(state_at(0, params))
    batch = collector(by_length, mask_truncated=True, penalty=penalty)(state_at(0, params))
    long = batch["stats"]["truncated"] == 1
    assert long.any() and not long.all()
    assert not batch["completion_mask"][long].any()
    np.testing.assert_array_equal(batch["completion_mask"][~long], plain["completion_mask"][~long])
    lengths = plain["completion_mask"].sum(axis=1)
    np.testing.assert_array_equal(
        batch["stats"]["reward"], plain["stats"]["reward"] - (lengths >= 3)
    )


def test_dynamic_sampling_goes_on_until_groups_have_contrast():
    _, params = model_and_params()
    calls = []

    def rewards(completions, records):
        calls.append(len(completions))
        # The first group of each try is flat, the second is not.
        return [1.0] * 4 + [float(i) for i in range(4)]

    batch = collector(rewards, max_tries=5)(state_at(0, params))
    assert calls == [8, 8] and not batch["stats"]["no_contrast"].any()
    assert batch["stats"]["tries"][0] == 2 and len(batch["tokens"]) == 8
    calls.clear()
    flat = lambda completions, records: calls.append(1) or [1.0] * 8
    batch = collector(flat, max_tries=3)(state_at(0, params))
    assert len(calls) == 3 and batch["stats"]["no_contrast"].all()
    assert not batch["advantages"].any()


@pytest.mark.parametrize("name", ["reinforce", "grpo"])
def test_a_policy_learns_a_task_in_seconds(name):
    """Sampling, rewards and advantages on the device; one answer of about 8 is right at first."""
    model, params = model_and_params()
    build = functools.partial(policy_gradient, model.forward)
    credit, objective = {
        "reinforce": rl.reinforce_with_baseline(build),
        "grpo": rl.grpo(build, 8),
    }[name]
    targets = [[i] for i in range(4)]
    batches = rl.collect_on_device(
        model, PROMPTS, rl.equals(targets, 1), credit, ONE_TOKEN, prompts_per_step=8, group_size=8
    )
    _, history = fit(params, objective, optax.adam(3e-3), batches, steps=40)
    mean = lambda rows: np.mean([row["reward"] for row in rows])
    first, last = mean(history[:3]), mean(history[-3:])
    assert first < 0.4 and last > 0.8, (first, last)
    assert all(row["gap"] < 1e-4 for row in history)


def test_host_and_device_collect_the_same():
    model, params = model_and_params()
    settings = dict(prompts_per_step=2, group_size=4)
    reward = rl.equals(TARGETS, SAMPLING.max_new_tokens)
    device = rl.collect_on_device(model, PROMPTS, reward, CREDIT, SAMPLING, **settings)
    got, wanted = device(state_at(3, params)), collector()(state_at(3, params))
    for name in ("tokens", "segment_ids", "positions", "completion_mask"):
        # The host pads prompts to a bucket.
        np.testing.assert_array_equal(got[name], wanted[name][:, -got[name].shape[1] :])
    np.testing.assert_allclose(got["sampler_log_probs"], wanted["sampler_log_probs"], atol=1e-4)
    # A response without the stop token is right to the verifier of texts, not to that of tokens.
    ended = ~wanted["truncated"]
    np.testing.assert_array_equal(
        np.asarray(got["stats"]["reward"])[ended], wanted["stats"]["reward"][ended]
    )
    with pytest.raises(ValueError, match="at most max_new_tokens = 3 tokens; the longest has 5"):
        rl.equals([[1] * 5] * 4, 3)


def test_a_run_with_several_updates_learns_on_the_host():
    model, params = model_and_params()
    build = functools.partial(policy_gradient, model.forward, kl_weight=1e-3)
    credit, objective = rl.grpo(build, 8)
    batches = rl.collect(
        model,
        PROMPTS,
        RECORDS,
        Digits(),
        in_process(exact),
        credit,
        ONE_TOKEN,
        prompts_per_step=8,
        group_size=8,
        updates=2,
        ref_params=params,
    )
    _, history = fit(params, objective, optax.adam(3e-3), batches, steps=60)
    assert {"kl", "kl_old", "clipped_low", "clipped_high", "entropy", "gap"} <= set(history[0])
    assert history[0]["kl"] < 1e-6 < history[-1]["kl"]
    assert history[-1]["reward"] > history[0]["reward"] + 0.4
    # The first update of a rollout is on-policy, the second is not.
    assert history[0]["kl_old"] < 1e-9 < 1e-6 < history[1]["kl_old"]
