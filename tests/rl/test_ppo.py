"""PPO: its loss and gradient against plain loops, its limits, its critic, and its adaptive KL."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import losses, rl
from jaxft.generation import SamplingConfig
from jaxft.objectives import (
    completion_values,
    policy_gradient,
    token_values,
    value_loss,
    with_value_head,
    without_value_head,
)
from jaxft.objectives.policy import token_mean
from jaxft.rewards import in_process
from jaxft.rl.collection import in_parts
from jaxft.rl.token_losses import reinforce
from jaxft.train import Checkpoints, fit
from tests.rl.rl_task import (
    PROMPTS,
    RECORDS,
    Digits,
    exact,
    model_and_params,
    taken,
)

ONE_TOKEN = SamplingConfig(max_new_tokens=1)
REWARDS = jnp.array([1.0, 0.0, 0.5, jnp.nan])
BETA, LAM, CLIP, VALUE_CLIP, WEIGHT = 0.2, 0.9, 0.2, 0.1, 0.3


@pytest.fixture(scope="module")
def params():
    """With a value head that has moved."""
    model, params = model_and_params()
    params = with_value_head(model, params)
    kernel = 0.3 * jax.random.normal(jax.random.key(5), params["value_head"]["kernel"].shape)
    return params | {"value_head": {"kernel": kernel, "bias": jnp.array([0.2])}}


@pytest.fixture(scope="module")
def batch(params):
    """Four responses of 5 tokens at most; in the first a tool's token lies between the policy's."""
    model, _ = model_and_params()
    rng = np.random.default_rng(0)
    mask = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], bool)
    seen = np.concatenate([np.ones((4, 3), bool), mask], axis=1)
    seen[0, 4] = True
    fields = {
        "tokens": jnp.asarray(rng.integers(0, 6, seen.shape)),
        "segment_ids": jnp.asarray(seen, jnp.int32),
        "positions": jnp.maximum(jnp.cumsum(jnp.asarray(seen), axis=1) - 1, 0),
        "completion_mask": jnp.asarray(mask),
    }
    read = jax.jit(completion_values, static_argnums=0)
    log_probs, values = read(model.forward, params, fields)
    noise = jnp.asarray(rng.normal(size=(4, *mask.shape)) * mask, jnp.float32)
    return fields | {
        "sampler_log_probs": log_probs,
        "old_log_probs": log_probs + 0.3 * noise[0],
        "ref_log_probs": log_probs + 0.3 * noise[1],
        "old_values": values + 0.2 * noise[2],
    }


@pytest.fixture(scope="module")
def credited(batch):
    credit, _ = make()
    return batch | credit(REWARDS, batch)


def make(reward_kl=BETA, lam=LAM, clip=CLIP, **settings):
    model, _ = model_and_params()
    settings = dict(value_clip=VALUE_CLIP, value_weight=WEIGHT) | settings
    return rl.ppo(
        functools.partial(policy_gradient, model.forward),
        reward_kl,
        lam=lam,
        clip_low=clip,
        clip_high=clip,
        **settings,
    )


def gradient(objective, params, batch):
    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch, None)


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance)


def test_credit_equals_a_slow_loop(batch, credited):
    wanted = {name: np.zeros((4, 5)) for name in ("advantages", "returns")}
    flat = []
    for i in range(3):  # The fourth has no verdict.
        tokens = np.flatnonzero(batch["completion_mask"][i])
        advantage, after = 0.0, 0.0
        for t in tokens[::-1]:
            kl = float(batch["old_log_probs"][i, t] - batch["ref_log_probs"][i, t])
            reward = -BETA * kl + (float(REWARDS[i]) if t == tokens[-1] else 0.0)
            value = float(batch["old_values"][i, t])
            advantage = reward + after - value + LAM * advantage
            after = value
            wanted["advantages"][i, t], wanted["returns"][i, t] = advantage, advantage + value
            flat.append(advantage)
    close(credited["returns"], wanted["returns"])
    counted = np.asarray(credited["completion_mask"])
    centred = (wanted["advantages"] - np.mean(flat)) / math.sqrt(np.var(flat, ddof=1) + 1e-8)
    close(credited["advantages"], np.where(counted, centred, 0.0))
    assert not counted[3].any()
    np.testing.assert_array_equal(counted[:3], batch["completion_mask"][:3])


def test_loss_equals_a_slow_loop(params, credited):
    model, _ = model_and_params()
    (loss, metrics), _ = gradient(make().objective, params, credited)
    log_probs, values = completion_values(model.forward, params, credited)
    total, critic, count = 0.0, 0.0, 0
    for i, t in zip(*np.nonzero(credited["completion_mask"]), strict=True):
        at = lambda name, i=i, t=t: float(credited[name][i, t])
        ratio = math.exp(float(log_probs[i, t]) - at("old_log_probs"))
        limited = min(max(ratio, 1 - CLIP), 1 + CLIP)
        total += max(-ratio * at("advantages"), -limited * at("advantages"))
        value, old = float(values[i, t]), at("old_values")
        near = old + min(max(value - old, -VALUE_CLIP), VALUE_CLIP)
        critic += 0.5 * max((value - at("returns")) ** 2, (near - at("returns")) ** 2)
        count += 1
    close(loss, (total + WEIGHT * critic) / count)
    close(metrics["value_loss"].value, critic / count)
    assert metrics["clipped_low"].value + metrics["clipped_high"].value > 0


def test_the_critics_gradient_equals_finite_differences(params, credited):
    """Gradients of its head, and of all below it; without clips, at whose kinks there is no derivative."""
    objective = make(clip=math.inf, value_clip=math.inf).objective
    run = jax.jit(lambda params: objective(params, credited, None)[0])
    grads = jax.jit(jax.grad(run))(params)
    for direction in (
        jax.tree.map(jnp.zeros_like, grads) | {"value_head": grads["value_head"]},
        grads | {"value_head": jax.tree.map(jnp.zeros_like, grads["value_head"])},
    ):
        norm = optax.global_norm(direction)
        moved = lambda step, d=direction, n=norm: run(
            jax.tree.map(lambda p, g: p + step * g / n, params, d)
        )
        close((moved(1e-3) - moved(-1e-3)) / 2e-3, norm, 1e-2)
    assert optax.global_norm(grads["value_head"]) > 1e-3


def test_a_detached_critic_teaches_its_head_alone(params, credited):
    model, _ = model_and_params()
    nothing = lambda log_probs, old, batch: (jnp.zeros_like(log_probs), {})

    def grads(**settings):
        critic = value_loss(WEIGHT, VALUE_CLIP, **settings)
        objective = policy_gradient(model.forward, nothing, token_mean, auxiliary=critic)
        return gradient(objective, params, credited)[1]

    shared, alone = grads(), grads(detach=True)
    jax.tree.map(close, shared.pop("value_head"), alone.pop("value_head"))
    assert optax.global_norm(shared) > 1e-3 and optax.global_norm(alone) == 0


def test_limits(params, batch):
    model, _ = model_and_params()
    fresh = {name: x for name, x in batch.items() if name != "old_log_probs"}
    zeros = fresh | {"old_values": jnp.zeros_like(batch["old_values"])}
    # No values and λ = 1: returns are the rewards to go, REINFORCE++'s advantages.
    given = make(reward_kl=0.0, lam=1.0).credit(REWARDS, zeros)
    plain = rl.reinforce_plus_plus(functools.partial(policy_gradient, model.forward)).credit(
        REWARDS, zeros
    )
    close(given["advantages"], plain["advantages"])
    close(given["returns"], jnp.where(given["completion_mask"], REWARDS[:, None], 0.0))
    # One step on a rollout, no clip and no critic: the policy gradient.
    on_policy = zeros | given
    _, objective = make(clip=math.inf, value_weight=0.0)
    build = functools.partial(policy_gradient, model.forward)
    wanted = gradient(build(reinforce(), token_mean), params, on_policy)[1]
    jax.tree.map(close, gradient(objective, params, on_policy)[1], wanted)
    # A critic that is right leaves nothing.
    perfect = zeros | {"old_values": given["returns"]}
    exactly = make(reward_kl=0.0, lam=0.3).credit(REWARDS, perfect)
    close(exactly["advantages"], jnp.zeros((4, 5)))


def test_a_head_of_zeros_is_worth_nothing_and_comes_off():
    model, params = model_and_params()
    whole = with_value_head(model, params)
    hidden = jnp.ones((2, 3, model.config.hidden_size))
    assert not token_values(whole, hidden).any()
    assert without_value_head(whole).keys() == params.keys()
    with pytest.raises(ValueError, match="no value_head; see with_value_head"):
        token_values(params, hidden)
    with pytest.raises(ValueError, match="ppo: no old_values"):
        make().credit(REWARDS, {})
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        make(value_weight=-1.0)


def test_the_weight_of_the_kl_adapts():
    """Ziegler et al.: at twice the target up by 20 % of n / horizon, at half of it down, no further."""
    adapt = functools.partial(losses.adapted_kl_weight, 0.5, count=1000, target=6.0, horizon=1e4)
    assert adapt(12.0) == pytest.approx(0.5 * 1.02) and adapt(99.0) == adapt(12.0)
    assert adapt(3.0) == pytest.approx(0.5 * 0.98) and adapt(6.0) == 0.5
    assert adapt(6.6) == pytest.approx(0.5 * 1.01)
    with pytest.raises(ValueError, match="needs weight >= 0, target > 0"):
        losses.adapted_kl_weight(0.5, 1.0, 10, target=0.0)
    model, params = model_and_params()
    with pytest.raises(ValueError, match="kl_control needs ref_log_probs"):
        taken(collector(make().credit, rl.add_old_policy(model.forward, 1.0)), params)


def test_kl_control_needs_a_credit_that_reads_its_weight():
    _, params = model_and_params()
    build = functools.partial(policy_gradient, lambda *args: None)
    unread = (
        rl.grpo(build, 8),
        rl.dapo(build, 8),
        rl.nft(build, 8),
        rl.reinforce_with_baseline(build),
    )
    for algorithm in unread:
        with pytest.raises(ValueError, match="this credit does not read"):
            collector(algorithm.credit)
    for algorithm in (rl.rloo(build, 8), rl.reinforce_plus_plus(build), rl.ppo(build)):
        collector(algorithm.credit)
    seen = []

    @rl.reads_kl_weight
    def own(rewards, batch):
        seen.append(batch["kl_weight"])
        return {"advantages": rewards}

    taken(collector(own), params)
    np.testing.assert_allclose(seen[0], np.full(64, 0.1), rtol=1e-6)


def collector(credit, *transforms):
    model, params = model_and_params()
    control = rl.KlControl(weight=0.1, target=1e-3, horizon=100.0)
    scores = rl.add_old_policy(model.forward, 1.0), rl.add_reference(model.forward, params, 1.0)
    sample = rl.answers(model, Digits(), in_process(exact), ONE_TOKEN, 8)
    return rl.collect(
        rl.Prompts(PROMPTS, 8, RECORDS), sample, credit, *(transforms or scores),
        updates=2, epochs=2, kl_control=control,
    )  # fmt: skip


def test_a_run_learns_and_goes_on_exactly_with_its_kl_weight(tmp_path):
    model, params = model_and_params()
    credit, objective = make(value_weight=0.5, value_clip=1.0)

    def run(name, steps, resume=False):
        batches = collector(credit)
        saves = Checkpoints(tmp_path / name, every=7, resume=resume)
        start = with_value_head(model, params)
        state, history = fit(
            start, objective, optax.adam(3e-3), batches, steps=steps, checkpoints=saves
        )
        return state, [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    state, whole = run("whole", 40)
    run("parts", 7)
    # Cut in the middle of a rollout, that rollout and its weight are kept, also for the next rollout.
    _, parts = run("parts", 13, resume=True)
    assert parts == whole[:13]
    weights = [row["kl_weight"] for row in whole]
    mean = lambda name, rows: np.mean([row[name] for row in rows])
    # One weight for the four steps of a rollout, the next by its KL.
    assert all(len(set(weights[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert weights[0] == pytest.approx(0.1)
    for i in range(0, 36, 4):
        kl = mean("response_kl", whole[i : i + 2])  # the first epoch: each row once
        wanted = losses.adapted_kl_weight(weights[i], kl, 64, target=1e-3, horizon=100.0)
        assert weights[i + 4] == pytest.approx(wanted)
    assert mean("reward", whole[-8:]) > mean("reward", whole[:8]) + 0.2
    assert mean("value", whole[-8:]) > 0.05 > abs(whole[0]["value"])
    assert state.params["value_head"]["kernel"].any()


def test_later_epochs_shuffle_rows_and_a_rollout_in_a_checkpoint_is_not_sampled_again(tmp_path):
    asked = []

    def rollout(params, place, key, weight):
        draws = place.draws
        asked.append((draws, weight))
        kl = np.full(8, 1.0, np.float32)
        rows = np.arange(8)[:, None] + 10 * draws
        return {"tokens": rows, "stats": {"response_kl": kl}}, 3

    collector = in_parts(rollout, 2, 2, rl.KlControl(1.0, 0.5, 80.0))
    rows = [batch["tokens"][:, 0].tolist() for batch in taken(collector, None, 5)]
    assert rows[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sorted(rows[2] + rows[3]) == list(range(8)) and rows[2] not in rows[:2]
    assert rows[4] == [30, 32, 34, 36]
    wanted = [(0, 1.0), (3, pytest.approx(1.02))]
    assert asked == wanted

    def objective(params, batch, key):
        seen = jnp.sum(batch["tokens"] * 10.0 ** jnp.arange(4)[:, None])
        return params["w"] * 0.0, {"seen": seen, "kl": jnp.mean(batch["stats"]["response_kl"])}

    def run(name, steps, resume=False):
        kept = Checkpoints(tmp_path / name, every=1, resume=resume)
        args = {"w": jnp.zeros(())}, objective, optax.sgd(1.0), collector
        state, history = fit(*args, steps=steps, checkpoints=kept, carry={"mine": jnp.ones(3)})
        assert state.carry["mine"].tolist() == [1, 1, 1]
        return [row["seen"] for row in history]

    whole = run("whole", 5)
    for stop in (1, 2, 3, 4):
        asked.clear()
        run(str(stop), stop)
        assert run(str(stop), 5, resume=True) == whole and asked == wanted
