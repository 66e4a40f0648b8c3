"""Groups that share a prompt, and batches without idle rows: with other models, layouts and losses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import losses, rl
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
from jaxft.rl.token_losses import clipped, off_policy_masked
from jaxft.train import accumulate
from tests.rl.rl_task import PROMPTS, RECORDS, model_and_params, taken
from tests.rl.test_groups import (
    ONCE,
    PROMPT,
    RESPONSE,
    ROWS,
    SIZE,
    experience,
    forward,
    thinned,
)
from tests.small_models import GPT2, LLAMA, large, start

MIXTURE = dataclasses.replace(
    LLAMA,
    num_layers=1,
    windows=(3,),
    experts=Experts(4, 2, 8, shared_width=4, correction=True, sigmoid=True),
)


def test_experts_have_the_gradient_of_rows():
    """All params train: routers see a shared prompt once, and no token is dropped whatever others choose."""
    model = Decoder(MIXTURE)
    params, batch = large(start(model)), experience(MIXTURE.vocab_size)
    run = jax.jit(jax.grad(lambda *args: jnp.sum(completion_log_probs(model.forward, *args) ** 2)))
    wanted = run(params, batch)
    chex.assert_trees_all_close(
        run(params, rl.in_groups(batch, SIZE)), wanted, rtol=1e-4, atol=1e-4
    )
    assert optax.tree.norm(wanted["layers"]["0"]["mlp"]["router"]) > 0.1


def test_a_row_of_a_group_may_be_longer_than_the_model_s_positions():
    """Fewer positions than the row has tokens, but as many as each of its texts."""
    model = Decoder(dataclasses.replace(GPT2, num_layers=1, max_length=PROMPT + RESPONSE))
    params, batch = large(start(model)), experience(GPT2.vocab_size)
    run = jax.jit(functools.partial(completion_log_probs, model.forward))
    wanted = run(params, batch)
    chex.assert_trees_all_close(run(params, rl.in_groups(batch, SIZE)), wanted, atol=2e-5)


def test_groups_of_one_are_rows():
    model, params = model_and_params()
    run = jax.jit(functools.partial(completion_log_probs, model.forward))
    wanted = run(params, experience())
    chex.assert_trees_all_close(run(params, rl.in_groups(experience(), 1)), wanted, atol=1e-5)


def test_every_clipped_loss_keeps_its_update_without_idle_rows_and_in_slices():
    """Half of the rows idle, one of them empty: groups without them, of which two slices add up."""
    params = model_and_params()[1]
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), experience())
    batch["advantages"][:SIZE] = 0
    build = functools.partial(policy_gradient, forward, correction=sequence_mask(0.01, 50.0))
    masked = lambda loss, *rest, **more: build(off_policy_masked(loss, 0.1), *rest, **more)
    made = [f(build, SIZE) for f in (rl.sapo, rl.luspo, rl.gspo, rl.cispo, rl.vespo)]
    made = [m.objective for m in (*made, rl.dr_grpo(masked, SIZE, 7))]

    @jax.jit
    def run(params, batch, weights=None):
        """(losses of the rows, their weights), and the gradient of the sum of all losses."""

        def total(params):
            ONCE.clear()
            found = [objective(params, batch, None) for objective in made]
            own = [metrics["loss"].weight for _, metrics in found]
            shares = [w / known for w, known in zip(own, weights or own, strict=True)]
            parts = [loss * share for (loss, _), share in zip(found, shares, strict=True)]
            return sum(parts), (parts, own)

        return jax.grad(total, has_aux=True)(params)

    wanted, (known, weights) = run(params, batch)
    small = thinned(rl.in_groups(batch, SIZE), 2)
    assert small["tokens"].shape[0] == 4 < 2 * ROWS // SIZE
    halves = [run(params, jax.tree.map(lambda x, i=i: x[i::2], small), weights) for i in (0, 1)]
    add = lambda *parts: jax.tree.map(lambda a, b: a + b, *parts)
    grads, (found, counted) = add(*halves)
    chex.assert_trees_all_close(grads, wanted, rtol=2e-4, atol=2e-6)
    chex.assert_trees_all_close((found, counted), (known, weights), rtol=1e-4, atol=1e-6)
    assert optax.tree.norm(wanted) > 1e-2 and all(loss != 0 for loss in known)


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
    noised = policy_gradient(with_noise(model.forward, embedding_noise()), clipped(), token_mean)
    with pytest.raises(ValueError, match="that share a prompt would share its noise"):
        jax.eval_shape(noised, params, rl.in_groups(experience(), SIZE), jax.random.key(0))
    with pytest.raises(ValueError, match="microbatches x devices must be at least 1, got 0"):
        thinned(experience(), 0)


def test_uncertain_tokens_are_those_of_the_whole_batch():
    """The quantile of half a batch is another, so microbatches are refused."""
    model, params = model_and_params()
    objective = policy_gradient(model.forward, clipped(), token_mean, top_entropy=0.3)
    in_halves = accumulate(jax.value_and_grad, 2)(objective, has_aux=True)
    with pytest.raises(ValueError, match="'entropy_threshold' is a value of the whole batch"):
        jax.eval_shape(in_halves, params, experience(), jax.random.key(0))
    entropies, mask = jnp.arange(12.0).reshape(2, 6), jnp.arange(12).reshape(2, 6) % 2 == 1
    assert losses.entropy_threshold(entropies, mask, 0.4) == 7.0  # of 1, 3, ... 11
    assert losses.entropy_threshold(entropies, mask & False, 0.4) == jnp.inf


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
        made["policy_version"] = np.where(np.arange(RESPONSE) < 1, -9, 0) * np.ones((ROWS, 1), int)
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
