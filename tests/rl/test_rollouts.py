"""Experience: what is sampled, how it is laid out, and that a policy learns from it."""

import collections
import contextlib
import dataclasses
import functools
import logging
import re
import textwrap

import jax
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.generation import SamplingConfig, generate, generate_continuously
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
    taken,
)

ONE_TOKEN = SamplingConfig(max_new_tokens=1)
CREDIT = lambda rewards, batch: {"advantages": grpo_advantages(rewards, 4)}


def collector(rewards=None, *transforms, tries=1, **settings):
    model, _ = model_and_params()
    rewards = in_process(exact) if rewards is None else rewards
    sample = rl.answers(model, Digits(), rewards, SAMPLING, 4)
    sample = rl.until_contrast(sample, tries) if tries > 1 else sample
    return rl.collect(rl.Prompts(PROMPTS, 2, RECORDS), sample, CREDIT, *transforms, **settings)


def by_length(completions, records):
    return [float(len(completion)) for completion in completions]


def test_answers_of_few_places_are_those_of_all_at_once():
    model, params = model_and_params()
    few = functools.partial(generate_continuously, places=3)
    batches = [
        rl.answers(model, Digits(), by_length, SAMPLING, 4, sampler=sampler)(
            params, rl.Asked(PROMPTS, RECORDS), jax.random.key(2)
        )
        for sampler in (few, generate)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *batches)


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
    scored = rl.policy_log_probs(model.forward, params, batch, temperature)
    assert np.abs(scored - batch["sampler_log_probs"]).max() < 1e-4
    behaviour, full = batch["behaviour_log_probs"], batch["sampler_log_probs"]
    # What top-k keeps has less than all of the mass.
    assert (behaviour == full).all() if top_k is None else (behaviour > full + 1e-3).any()


@contextlib.contextmanager
def compiled():
    """The number of programs of each name that are compiled meanwhile."""
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
                rl.policy_log_probs(model.forward, params, batch)
    assert len(shapes) > 30
    # Of responses, scoring sees two buckets: 16 and the limit. The rest is small: keys, flags of rows.
    most = {"prefill": 2, "fork": 4, "_decode": 4, "completion_log_probs": 4}
    assert not {name: n for name, n in found.items() if n > most.get(name, 8)}
    assert {"prefill", "_decode"} <= set(found)


def test_experience_follows_from_params_carry_and_key_alone():
    _, params = model_and_params()
    one, two = taken(collector(), params, 2)
    again = collector()
    carry = again.carry
    for wanted, number in ((one, 0), (two, 1)):
        got, carry = again(params, carry, jax.random.key(number))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert carry["experience"]["draws"] == carry["experience"]["rollouts"] == 2
    other, _ = again(params, {"experience": collector().carry["experience"]}, jax.random.key(7))
    assert any((other["tokens"] != one["tokens"]).ravel())
    # Four prompts, two at a time: an epoch has each once.
    asked = lambda batch: {tuple(row[:16][-2:]) for row in batch["tokens"].tolist()}
    assert asked(one) | asked(two) == {tuple(prompt) for prompt in PROMPTS}


def test_several_updates_share_a_rollout():
    model, params = model_and_params()
    old = rl.add_old_policy(model.forward, 1.0)
    one, two = taken(collector(by_length, old, updates=2), params, 2)
    (whole,) = taken(collector(by_length), params)
    assert len(one["tokens"]) == len(two["tokens"]) == 4
    np.testing.assert_array_equal(one["advantages"], whole["advantages"][0::2])
    # Of the width of the longest prompt and response.
    size = whole["completion_mask"].shape[1]
    np.testing.assert_array_equal(two["completion_mask"][:, :size], whole["completion_mask"][1::2])
    assert two["completion_mask"].shape[1] == SAMPLING.max_new_tokens
    gap = np.abs(two["old_log_probs"] - two["sampler_log_probs"])
    assert gap.max() < 1e-4 and "old_log_probs" not in whole
    with pytest.raises(ValueError, match="pass add_old_policy"):
        taken(collector(by_length, updates=2), params)


def test_rollouts_of_several_updates_have_one_shape():
    """Prompts of 1 and 20 tokens, one a step: batches of two shapes, or of one where a carry holds them."""
    model, params = model_and_params()
    prompts = rl.Prompts([[1], [2] * 20], 1, RECORDS[:2])
    sample = rl.answers(model, Digits(), by_length, SAMPLING, 4)
    shapes = lambda batches: {batch["tokens"].shape[1] for batch in taken(batches, params, 4)}
    assert len(shapes(rl.collect(prompts, sample, CREDIT))) == 2
    old = rl.add_old_policy(model.forward, 1.0)
    assert shapes(rl.collect(prompts, sample, CREDIT, old, updates=2)) == {24 + 3}


def test_columns_stand_at_every_response_of_their_prompt_and_reach_the_sampler():
    model, params = model_and_params()
    images = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
    seen = []

    def sampler(*args, columns, **settings):
        seen.append(columns.get("image"))
        return generate(*args, **settings)

    prompts = rl.Prompts(PROMPTS, 2, RECORDS, columns={"image": images})
    sample = rl.until_contrast(
        rl.answers(model, Digits(), by_length, SAMPLING, 4, sampler=sampler), 2
    )
    old = rl.add_old_policy(model.forward, 1.0)
    parts = taken(rl.collect(prompts, sample, CREDIT, old, updates=2, epochs=2), params, 4)
    for batch in parts:
        first = batch["tokens"][:, :16][:, -2]  # the prompt's digit
        np.testing.assert_array_equal(batch["image"], images[np.asarray(first)])
        assert batch["image"].dtype == np.uint8
    assert seen[0].shape == (2, 2, 3)
    for name in ("tokens", "advantages"):
        with pytest.raises(ValueError, match=f"columns may not be named ..{name}"):
            taken(
                rl.collect(rl.Prompts(PROMPTS, 2, RECORDS, {name: images}), sample, CREDIT), params
            )
    for wrong in ({"image": images[:3]}, {"a/b": images}):
        with pytest.raises(
            ValueError, match="for 4 prompts; it needs one row per prompt, and no '/'"
        ):
            rl.Prompts(PROMPTS, 2, RECORDS, wrong)


def test_rewards_are_checked_and_missing_ones_defined():
    _, params = model_and_params()
    with pytest.raises(ValueError, match="returned 3 rewards for 8 completions"):
        taken(collector(lambda completions, records: [1.0, 2.0, 3.0]), params)
    with pytest.raises(ValueError, match="infinite reward"):
        taken(collector(lambda completions, records: [np.inf] * 8), params)
    some = lambda completions, records: [None, 1, 0, 0] + [np.nan] * 4
    (batch,) = taken(collector(some), params)
    assert batch["stats"]["unscored"].tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
    assert batch["stats"]["no_contrast"].tolist() == [0] * 4 + [1] * 4
    assert batch["advantages"][0] == 0 and not batch["advantages"][4:].any()
    assert batch["advantages"][1] > 0


def test_sizes_and_greedy_sampling_are_errors():
    model, params = model_and_params()
    with pytest.raises(ValueError, match="8 responses cannot be split over 3"):
        taken(collector(None, rl.add_old_policy(model.forward, 1.0), updates=3), params)
    with pytest.raises(ValueError, match="0 epochs must be positive"):
        collector(epochs=0)
    with pytest.raises(ValueError, match="tries must be at least 1"):
        rl.until_contrast(None, 0)
    with pytest.raises(ValueError, match="temperature=0 is greedy"):
        rl.sample_groups(model, params, PROMPTS, jax.random.key(0), SamplingConfig(3, 0.0), 2)
    with pytest.raises(ValueError, match="3 prompts for 4 records"):
        rl.Prompts(PROMPTS[:3], 2, RECORDS)


def test_truncated_responses_leave_the_loss_but_not_the_baseline():
    _, params = model_and_params()
    penalty = rl.add_penalty(lambda lengths: -1.0 * (lengths >= 3))
    (plain,) = taken(collector(by_length), params)
    (batch,) = taken(collector(by_length, penalty, rl.mask_truncated), params)
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
        calls.append([record["answer"] for record in records[::4]])
        # The first group of each try is flat, the second is not.
        return [1.0] * 4 + [float(i) for i in range(4)]

    batches = collector(rewards, tries=5)
    batch, carry = batches(params, batches.carry, jax.random.key(0))
    # Of four prompts two a draw: the second draw has the other two.
    assert len(calls) == 2 and sorted(calls[0] + calls[1]) == ["0", "1", "2", "3"]
    assert carry["experience"]["draws"] == 2 and carry["experience"]["rollouts"] == 1
    assert not batch["stats"]["no_contrast"].any()
    assert batch["stats"]["tries"][0] == 2 and len(batch["tokens"]) == 8
    calls.clear()
    flat = lambda completions, records: calls.append(1) or [1.0] * 8
    (batch,) = taken(collector(flat, tries=3), params)
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
        model, rl.Prompts(PROMPTS, 8), rl.equals(targets, 1), credit, ONE_TOKEN, group_size=8
    )
    _, history = fit(params, objective, optax.adam(3e-3), batches, steps=40)
    mean = lambda rows: np.mean([row["reward"] for row in rows])
    first, last = mean(history[:3]), mean(history[-3:])
    assert first < 0.4 and last > 0.8, (first, last)
    assert all(row["gap"] < 1e-4 for row in history)


def test_host_and_device_collect_the_same():
    model, params = model_and_params()
    reward, prompts = rl.equals(TARGETS, SAMPLING.max_new_tokens), rl.Prompts(PROMPTS, 2)
    device = rl.collect_on_device(model, prompts, reward, CREDIT, SAMPLING, group_size=4)
    (*_, got), (*_, wanted) = taken(device, params, 4), taken(collector(), params, 4)
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
        rl.Prompts(PROMPTS, 8, RECORDS),
        rl.answers(model, Digits(), in_process(exact), ONE_TOKEN, 8),
        credit,
        rl.add_old_policy(model.forward, 1.0),
        rl.add_reference(model.forward, params, 1.0),
        updates=2,
    )
    _, history = fit(params, objective, optax.adam(3e-3), batches, steps=60)
    assert {"kl", "kl_old", "clipped_low", "clipped_high", "entropy", "gap"} <= set(history[0])
    assert history[0]["kl"] < 1e-6 < history[-1]["kl"]
    assert history[-1]["reward"] > history[0]["reward"] + 0.4
    # The first update of a rollout is on-policy, the second is not.
    assert history[0]["kl_old"] < 1e-9 < 1e-6 < history[1]["kl_old"]


def test_the_example_of_the_algorithms_runs_as_it_is_printed():
    """The code of jaxft.rl.algorithms' docstring, with the names that it leaves to the reader."""
    text = rl.algorithms.__doc__
    code = textwrap.dedent(re.search(r"\n\n((?:    .*\n|\n)+)", text).group(1))
    (own,) = re.findall(r"parts: (Algorithm\(.*\))\.", text)
    model, params = model_and_params()
    given = dict(
        model=model, params=params, tokenizer=Digits(), rewards=in_process(exact), ids=PROMPTS,
        records=RECORDS, optimizer=optax.adam(1e-3), functools=functools, SamplingConfig=SamplingConfig,
        policy_gradient=policy_gradient, fit=functools.partial(fit, callbacks=[]),
    )  # fmt: skip
    public = {name: getattr(rl, name) for name in rl.__all__}
    scope = public | vars(rl.algorithms) | given
    code = code.replace("steps=100", "steps=2")
    assert "grpo(build" in code and "collect(" in code
    exec(code + f"\nown = {own}", scope)
    assert callable(scope["own"].credit) and scope["batches"].carry["experience"]["draws"] == 0
