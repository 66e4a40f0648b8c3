"""Groups that share a prompt, and batches without idle rows: other models, layouts and losses than the rest."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.models import Decoder, Experts, with_noise
from jaxft.objectives import (
    completion_log_probs,
    distillation,
    embedding_noise,
    function_distance,
    policy_gradient,
    token_logits,
)
from jaxft.objectives.policy import sequence_mask, token_mean
from jaxft.parallel import make_mesh
from jaxft.rl.token_losses import clipped, off_policy_masked
from jaxft.train import accumulate, fit
from tests.rl.rl_task import PROMPTS, RECORDS, model_and_params, taken
from tests.rl.test_groups import PROMPT, RESPONSE, ROWS, SIZE, experience, thinned
from tests.small_models import GPT2, LLAMA, large, start

MIXTURE = dataclasses.replace(
    LLAMA,
    windows=(3, None),
    experts=Experts(4, 2, 8, shared_width=4, correction=True, sigmoid=True),
)
# Fewer positions than a row of a group has tokens, but as many as each of its texts.
SHORT = dataclasses.replace(GPT2, max_length=PROMPT + RESPONSE)


@pytest.mark.parametrize("config", [MIXTURE, SHORT], ids=["experts", "positions"])
def test_the_gradient_of_all_params_is_that_of_rows(config):
    """Routers see a shared prompt once, and drop no token whatever the others choose."""
    model = Decoder(config)
    params, batch = large(start(model)), experience(config.vocab_size)
    objective = policy_gradient(model.forward, clipped(), token_mean, kl_weight=0.1)
    run = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, None)[0]))
    loss, wanted = run(params, batch)
    found, grads = run(params, rl.in_groups(batch, SIZE))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    chex.assert_trees_all_close(grads, wanted, rtol=1e-4, atol=2e-5)
    assert optax.tree.norm(wanted) > 0.1


def test_experts_over_devices_take_groups_and_microbatches():
    model = Decoder(dataclasses.replace(MIXTURE, num_layers=1, windows=()))
    params, batch = start(model), experience(MIXTURE.vocab_size)
    batch = jax.tree.map(lambda x: np.concatenate([x[: 2 * SIZE]] * 2), batch)
    objective = rl.dapo(functools.partial(policy_gradient, model.forward), SIZE)[1]
    take = functools.partial(fit, params, objective, optax.sgd(1.0), steps=1)
    wanted, _ = take([batch])
    mesh = make_mesh(expert=2, data=1, devices=jax.devices()[:2])
    found, _ = take([rl.in_groups(batch, SIZE)], mesh=mesh, microbatches=2)
    moved = jax.tree.map(lambda a, b: a - b, wanted.params, params)
    assert optax.tree.norm(moved) > 1e-3
    chex.assert_trees_all_close(found.params, wanted.params, atol=1e-5)


def test_groups_of_one_are_rows():
    model, params = model_and_params()
    run = jax.jit(functools.partial(completion_log_probs, model.forward))
    wanted = run(params, experience())
    chex.assert_trees_all_close(run(params, rl.in_groups(experience(), 1)), wanted, atol=1e-5)


def test_every_clipped_loss_keeps_its_update_without_idle_rows_and_in_slices():
    """Half of the rows idle, one of them empty; in groups and in rows, whole and in microbatches."""
    model, params = model_and_params()
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), experience())
    batch["advantages"][:SIZE] = 0
    build = functools.partial(
        policy_gradient, model.forward, correction=sequence_mask(0.01, 50.0)
    )
    masked = lambda loss, *rest, **more: build(off_policy_masked(loss, 0.1), *rest, **more)
    made = [f(build, SIZE) for f in (rl.sapo, rl.luspo, rl.gspo, rl.cispo)]
    made += [rl.vespo(build, SIZE), rl.dr_grpo(masked, SIZE, 7)]

    def each(slices, batch):
        """The losses and gradients of all, each over its own rows or tokens."""
        one = lambda m: accumulate(jax.value_and_grad, slices)(m.objective, has_aux=True)
        run = lambda params, batch: [one(m)(params, batch, jax.random.key(0)) for m in made]
        found = jax.jit(run)(params, batch)
        return [(loss, grads) for (loss, _), grads in found]

    wanted = each(1, batch)
    small = thinned(rl.in_groups(batch, SIZE), 2)
    assert small["tokens"].shape[0] < 2 * ROWS // SIZE
    for found in (each(2, small), each(2, thinned(batch, 2))):
        chex.assert_trees_all_close(found, wanted, rtol=2e-4, atol=2e-6)
    assert all(optax.tree.norm(grads) > 1e-3 for _, grads in wanted)


def test_what_other_rows_would_change_is_refused():
    model, params = model_and_params()
    absent = thinned(experience())
    assert "absent_mask" in absent
    task = lambda forward: policy_gradient(forward, clipped(), token_mean)
    distilled = distillation(model.forward, task, model.forward, weight=0.5)
    with pytest.raises(ValueError, match="distillation: rows without an advantage were left out"):
        jax.eval_shape(distilled, params | {"teacher": params}, absent, None)
    distance = function_distance(token_logits(model.forward))
    with pytest.raises(ValueError, match="token_logits: rows without an advantage were left out"):
        jax.eval_shape(distance, params, params, absent, None)
    noised = policy_gradient(
        with_noise(model.forward, embedding_noise()), clipped(), token_mean
    )
    with pytest.raises(ValueError, match="that share a prompt would share its noise"):
        jax.eval_shape(noised, params, rl.in_groups(experience(), SIZE), jax.random.key(0))
    with pytest.raises(ValueError, match="microbatches x devices must be at least 1, got 0"):
        thinned(experience(), 0)


def test_uncertain_tokens_are_those_of_the_whole_batch():
    """The quantile of half a batch is another: microbatches are refused, and devices agree."""
    model, params = model_and_params()
    objective = policy_gradient(model.forward, clipped(), token_mean, top_entropy=0.3)
    take = functools.partial(fit, large(params), objective, optax.sgd(0.1), steps=1)
    batch = experience()
    wanted, known = take([batch])
    found, rows = take([batch], mesh=make_mesh(data=4, devices=jax.devices()[:4]))
    chex.assert_trees_all_close(found.params, wanted.params, atol=1e-5)
    assert rows[0]["entropy_threshold"] == pytest.approx(known[0]["entropy_threshold"], abs=1e-5)
    assert known[0]["entropy_threshold"] > known[0]["entropy"] * 0.5
    with pytest.raises(ValueError, match="'entropy_threshold' is a value of the whole batch"):
        take([batch], microbatches=2)
    none = batch | {"completion_mask": batch["completion_mask"] & False}
    assert take([none])[1][0]["loss"] == 0


def test_a_prompt_padded_at_the_right_is_refused():
    def sample(params, asked, key):
        made = {**experience(), "truncated": np.zeros(ROWS, bool)}
        made["segment_ids"][2, PROMPT - 1] = 0
        return made | {"rewards": made.pop("advantages")}

    credit = lambda rewards, batch: {"advantages": rewards}
    batches = rl.collect(rl.Prompts(PROMPTS, 3, RECORDS), sample, credit)
    with pytest.raises(ValueError, match="row 2 has padding .* pads prompts at the left"):
        taken(batches, None)


def test_stale_tokens_count_for_penalties_and_leave_the_loss():
    """An answer is as long as it was when it was sampled, whatever the age of its tokens."""
    lengths = []

    def sample(params, asked, key):
        made = experience() | {"truncated": np.zeros(ROWS, bool)}
        made["policy_version"] = np.where(np.arange(RESPONSE) < 1, -9, 0) * np.ones(
            (ROWS, 1), int
        )
        return made | {"rewards": 0 * made.pop("advantages")}

    def penalty(found):
        lengths.append(np.asarray(found))
        return -np.asarray(found)

    credit = lambda rewards, batch: {"advantages": rewards}
    batches = rl.collect(
        rl.Prompts(PROMPTS, 3, RECORDS),
        sample,
        credit,
        rl.add_penalty(penalty),
        max_staleness=1,
        rollouts=1,
        share_prompts=SIZE,
    )
    (batch,) = taken(batches, {"w": jnp.zeros(())})
    batches.close()
    own = experience()["completion_mask"]
    np.testing.assert_array_equal(lengths[0], own.sum(axis=1))
    np.testing.assert_array_equal(batch["advantages"].reshape(-1), -own.sum(axis=1))
    left = batch["completion_mask"].reshape(own.shape)
    assert not left[:, 0].any() and np.array_equal(left[:, 1:], own[:, 1:])
