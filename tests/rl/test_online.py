"""Preferences of the policy's own samples: against the pairwise objective itself, and slow loops."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.losses import dpo_loss, ipo_loss
from jaxft.objectives import hypo, policy_gradient, preference, sequence_log_probs
from jaxft.rewards import in_process
from jaxft.rl.online import as_groups, best_and_worst
from jaxft.train import Checkpoints, accumulate, fit
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, Digits, exact, model_and_params, taken

LOSS = functools.partial(dpo_loss, beta=0.5)


def start_and_now():
    """A reference, and a policy that has moved away from it."""
    model, base = model_and_params()
    leaves, tree = jax.tree.flatten(base)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return model, base, tree.unflatten(moved)


KEY = lambda i: jax.random.key(4 + i)


def lengths_as_rewards(completions, records):
    return [float(len(text)) for text in completions]


def collected(loss, rewards=lengths_as_rewards, group_size=3):
    model, base, params = start_and_now()
    algorithm = rl.online_preference(
        functools.partial(policy_gradient, model.forward), loss, group_size
    )
    sample = rl.answers(model, Digits(), rewards, SAMPLING, group_size)
    reference = rl.add_reference(model.forward, base, 1.0)
    batches = rl.collect(rl.Prompts(PROMPTS, 4, RECORDS), sample, algorithm.credit, reference)
    return model, params, algorithm, *taken(batches, params, key=KEY)


def test_best_and_worst_is_a_loop():
    nan = jnp.nan
    rewards = jnp.array([1.0, 3, 2, nan, 0, 5, 4, 4, 4, nan, nan, 1])
    best, worst, paired = best_and_worst(rewards, 3)
    assert best.tolist()[:3] == [1, 5, 6] and worst.tolist()[:2] == [0, 4]
    assert paired.tolist() == [True, True, False, False]
    counted = jnp.arange(12) != 1  # The best of the first group reached the limit, say.
    best, worst, paired = best_and_worst(rewards, 3, counted)
    assert (int(best[0]), int(worst[0])) == (2, 0) and bool(paired[0])
    with pytest.raises(ValueError, match="12 rewards are not a multiple of the group size 5"):
        best_and_worst(rewards, 5)


@pytest.mark.parametrize("loss", [LOSS, functools.partial(ipo_loss, beta=0.3)])
def test_its_gradient_is_that_of_the_pairwise_objective(loss):
    """The pairs of the rollout, given to the offline objective, have the same mean and gradient."""
    model, params, algorithm, batch = collected(loss)
    values = np.asarray(batch["stats"]["reward"])
    best, worst, paired = map(np.asarray, best_and_worst(jnp.asarray(values), 3))
    assert 2 <= paired.sum() <= 4
    groups = as_groups(batch, np.asarray(batch["ref_log_probs"]), 1)
    rows = np.stack([best, worst], axis=1)[paired]
    pairs = jax.tree.map(lambda x: x[:, 0][rows], groups)
    offline = jax.jit(jax.value_and_grad(preference(model.forward, loss), has_aux=True))
    (value, metrics), wanted = offline(params, pairs, None)
    online = jax.jit(jax.value_and_grad(algorithm.objective, has_aux=True))
    (_, shown), found = online(params, batch, None)
    chex.assert_trees_all_close(found, wanted, rtol=2e-3, atol=2e-5)
    assert float(shown["pair_loss"].value) == pytest.approx(float(value), rel=1e-3)
    accuracy = float(metrics["rewards/accuracy"].value)
    assert float(shown["pair_accuracy"].value) == pytest.approx(accuracy)
    assert float(shown["paired"].value) == pytest.approx(paired.mean())
    # Rows need not stay together: any split into microbatches is the same step.
    shuffled = jax.tree.map(lambda x: x[np.random.default_rng(0).permutation(12)], batch)
    parts = accumulate(jax.value_and_grad, 3)(algorithm.objective, has_aux=True)
    _, split = jax.jit(parts)(params, shuffled, jax.random.key(0))
    chex.assert_trees_all_close(split, wanted, rtol=2e-3, atol=2e-5)


def test_groups_without_a_pair_teach_nothing():
    flat = lambda completions, records: [1.0] * len(completions)
    *_, batch = collected(LOSS, flat)
    assert not np.asarray(batch["advantages"]).any() and not batch["stats"]["paired"].any()
    assert np.isnan(batch["stats"]["pair_loss"]).all()
    silent = lambda completions, records: [float("nan")] * len(completions)
    assert not np.asarray(collected(LOSS, silent)[-1]["advantages"]).any()
    with pytest.raises(ValueError, match="at least 2, got 1"):
        rl.online_preference(lambda *_: None, LOSS, 1)


def test_online_dpo_learns_the_digits():
    model, params = model_and_params()
    loss = functools.partial(dpo_loss, beta=0.1)
    algorithm = rl.online_preference(functools.partial(policy_gradient, model.forward), loss, 8)
    sample = rl.answers(model, Digits(), in_process(exact), SamplingConfig(max_new_tokens=1), 8)
    reference = rl.add_reference(model.forward, params, 1.0)
    batches = rl.collect(rl.Prompts(PROMPTS, 4, RECORDS), sample, algorithm.credit, reference)
    _, history = fit(
        params, algorithm.objective, optax.adam(5e-3), batches, steps=40, key=jax.random.key(0)
    )
    few = lambda rows: np.mean([row["reward"] for row in rows])
    assert few(history[-5:]) > few(history[:5]) + 0.1


def test_xpo_pulls_away_from_what_the_reference_says():
    """Its gradient is that of loss + α log π(y_ref), formed from the same rows by a loop over groups."""
    model, base, params = start_and_now()
    build, alpha = functools.partial(policy_gradient, model.forward), 0.3
    algorithm = rl.xpo(build, LOSS, 4, alpha)
    half = rl.answers(model, Digits(), lengths_as_rewards, SAMPLING, 2)
    both, reference = (
        rl.answers_of_both(half, model, base, 1.0),
        rl.add_reference(model.forward, base, 1.0),
    )
    batches = rl.collect(rl.Prompts(PROMPTS, 4, RECORDS), both, algorithm.credit, reference)
    (batch,) = taken(batches, params, key=KEY)
    given = batch["from_reference"].reshape(4, 4)
    assert (given == [False, False, True, True]).all()
    # Each half is what its model samples; both have the log-probs of policy and reference.
    sampler = np.where(batch["from_reference"][:, None], batch["ref_log_probs"], 0)
    behaved = np.where(batch["from_reference"][:, None], batch["behaviour_log_probs"], 0)
    np.testing.assert_allclose(behaved, sampler, atol=1e-4)
    scored = rl.policy_log_probs(model.forward, params, batch)
    np.testing.assert_allclose(batch["sampler_log_probs"], scored, atol=1e-4)
    own = np.asarray(batch["behaviour_log_probs"] - scored)[~batch["from_reference"]]
    assert np.abs(own).max() < 1e-4
    asked = [tuple(row[:16][-2:]) for row in batch["tokens"].tolist()]
    assert all(len(set(asked[4 * i : 4 * i + 4])) == 1 for i in range(4))
    groups = as_groups(batch, np.asarray(batch["ref_log_probs"]), 4)
    values = np.asarray(batch["stats"]["reward"]).reshape(4, 4)

    def objective(params):
        sums = sequence_log_probs(model.forward, params, groups).sums
        total, pairs = 0.0, 0
        for i in range(4):
            best, worst = int(values[i].argmax()), int(values[i].argmin())
            if values[i, best] == values[i, worst]:
                continue
            margin = sums[i, best] - sums[i, worst]
            margin -= groups["ref_log_probs"][i, best] - groups["ref_log_probs"][i, worst]
            total += -jax.nn.log_sigmoid(0.5 * margin) + alpha * (sums[i, 2] + sums[i, 3]) / 2
            pairs += 1
        return total / pairs

    wanted = jax.jit(jax.grad(objective))(params)
    online = jax.jit(jax.value_and_grad(algorithm.objective, has_aux=True))
    (_, shown), found = online(params, batch, None)
    chex.assert_trees_all_close(found, wanted, rtol=2e-3, atol=2e-5)
    total = jnp.sum(jnp.where(batch["completion_mask"], scored, 0), axis=1).reshape(4, 4)
    expected = float(total[:, 2:].mean())
    assert float(shown["reference_log_prob"].value) == pytest.approx(expected, rel=1e-3)
    none = rl.xpo(build, LOSS, 4, 0.0).credit(jnp.asarray(values.reshape(-1)), batch)
    plain = rl.online_preference(build, LOSS, 4).credit(jnp.asarray(values.reshape(-1)), batch)
    np.testing.assert_array_equal(none["advantages"], plain["advantages"])
    with pytest.raises(ValueError, match="group_size must be even"):
        rl.xpo(build, LOSS, 3)


def test_samples_beside_pairs_are_the_policy_s_own():
    model, base, params = start_and_now()
    config = SamplingConfig(max_new_tokens=3, stop_ids=(7,))

    def make(config):
        prompts = rl.Prompts(PROMPTS, 2)
        return rl.SamplesBeside(iter([{}] * 3), model, prompts, base, config, samples=3)

    batch, other = (found["online"] for found in taken(make(config), params, 2))
    assert batch["tokens"].shape[:2] == (2, 3)
    chex.assert_trees_all_equal(batch, taken(make(config), params)[0]["online"])
    assert (
        batch["tokens"].shape != other["tokens"].shape or (batch["tokens"] != other["tokens"]).any()
    )
    ref = jax.jit(functools.partial(sequence_log_probs, model.forward))(base, batch)
    np.testing.assert_allclose(batch["ref_log_probs"], ref.sums, rtol=1e-4, atol=1e-5)
    assert (np.asarray(ref.lengths) == batch["loss_mask"].sum(-1)).all()
    seen = batch["segment_ids"] * (batch["loss_mask"] == 0)
    prompts = [batch["tokens"][i, 0][seen[i, 0] > 0].tolist() for i in range(2)]
    assert all(prompt in PROMPTS for prompt in prompts) and prompts[0] != prompts[1]
    # Of the start itself the KL is 0; of the policy its estimate is the mean log-ratio.
    objective = jax.jit(hypo(model.forward, LOSS, kl_weight=1.0))
    pair = {k: v[:, :2] for k, v in batch.items()}
    _, metrics = objective(base, pair | {"online": batch}, None)
    assert abs(float(metrics["kl"].value)) < 1e-4
    now = jax.jit(functools.partial(sequence_log_probs, model.forward))(params, batch)
    _, metrics = objective(params, pair | {"online": batch}, None)
    expected = float(jnp.mean(now.sums - batch["ref_log_probs"]))
    assert float(metrics["kl"].value) == pytest.approx(expected, rel=1e-3)
    for wrong in (dict(temperature=0.5), dict(top_k=3)):
        with pytest.raises(ValueError, match="sample from another policy"):
            make(SamplingConfig(max_new_tokens=3, **wrong))


def test_pairs_with_samples_go_on_where_they_were(tmp_path):
    model, base, params = start_and_now()

    class Numbers:
        at = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return {"pair": jnp.array(self.at)}

        def get_state(self):
            return {"at": self.at}

        def set_state(self, position):
            self.at = position["at"]

    def objective(params, batch, key):
        places = jnp.arange(batch["online"]["tokens"].size).reshape(batch["online"]["tokens"].shape)
        drawn = jnp.sum(batch["online"]["tokens"] * (1 + places % 7))
        return jnp.sum(params["embed"]["embedding"] ** 2), {"pair": batch["pair"], "drawn": drawn}

    def run(name, steps, resume=False):
        config = SamplingConfig(max_new_tokens=3)
        prompts = rl.Prompts(PROMPTS, 2)
        batches = rl.SamplesBeside(Numbers(), model, prompts, base, config, samples=2)
        saves = Checkpoints(tmp_path / name, resume=resume)
        args = params, objective, optax.sgd(0.1), batches
        _, history = fit(*args, steps=steps, checkpoints=saves)
        return [(row["pair"], row["drawn"]) for row in history]

    whole = run("whole", 4)
    assert [pair for pair, _ in whole] == [1, 2, 3, 4] and len({n for _, n in whole}) > 2
    run("parts", 2)
    assert run("parts", 4, resume=True) == whole
