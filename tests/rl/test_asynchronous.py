"""Rollouts that a thread samples ahead of training, with a sampler that waits for events of the test."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.keys import stream
from jaxft.losses import truncated_weights
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_correction, token_mean
from jaxft.parallel import make_mesh
from jaxft.rl.advantages import centred_advantages
from jaxft.rl.algorithms import clipped
from jaxft.rl.rollouts import model_inputs
from jaxft.train import Checkpoints, fit
from tests.rl.rl_task import model_and_params

GROUP, WIDTH, SIZE = 2, 2, 3
PROMPTS = rl.Prompts([[1, 2], [3, 4], [5, 6]], 1)
CREDIT = lambda rewards, batch: {"advantages": centred_advantages(rewards, GROUP)}


class Sampler:
    """Rows whose tokens are the first param; each call waits for a `release`, if there are `turns`."""

    def __init__(self, slow=False, **own):
        self.asked, self.started, self.own = [], threading.Semaphore(0), own
        self.turns = threading.Semaphore(0) if slow else None

    def __call__(self, params, asked, key):
        self.asked.append(
            (list(map(list, asked.ids)), float(params["w"]), jax.random.bits(key).item())
        )
        self.started.release()
        if self.turns is not None:
            assert self.turns.acquire(timeout=60)
        ones = np.ones((GROUP, WIDTH + SIZE), np.int32)
        own = {n: f(len(self.asked)) if callable(f) else f for n, f in self.own.items()}
        return {
            "tokens": ones * asked.ids[0][0],
            "segment_ids": ones,
            "positions": np.cumsum(ones, axis=1) - 1,
            "completion_mask": np.ones((GROUP, SIZE), bool),
            "sampler_log_probs": np.full((GROUP, SIZE), np.float32(params["w"])),
            "truncated": np.zeros(GROUP, bool),
            "rewards": [0.0, 1.0],
        } | own


def run(sampler, steps=6, most=0, objective=None, transforms=(), **settings):
    """Rows of a run whose param `w` counts the steps."""
    objective = objective or (
        lambda params, batch, key: (
            params["w"],
            {"sampled_at": jnp.mean(batch["sampler_log_probs"]), "prompt": batch["tokens"][0, 0]}
            | {name: jnp.mean(x) for name, x in batch["stats"].items()},
        )
    )
    made = {n: settings.pop(n) for n in ("updates", "epochs") if n in settings}
    made |= dict(max_staleness=most, rollouts=steps)
    batches = rl.collect(PROMPTS, sampler, CREDIT, *transforms, **made)
    args = {"w": jnp.zeros(())}, objective, optax.sgd(-1.0), batches
    return fit(*args, steps=steps, **settings)[1]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def column(rows, name):
    return [row[name] for row in rows]


@pytest.mark.parametrize("most", [1, 2])
def test_rollouts_come_in_order_and_no_policy_is_older_than_the_bound(most):
    rows, plain = run(Sampler(), most=most), run(Sampler())
    assert column(rows, "prompt") == column(plain, "prompt")
    ages = [step - at for step, at in enumerate(column(rows, "sampled_at"))]
    assert ages == column(rows, "staleness") and 0 <= min(ages) <= max(ages) <= most
    assert ages == column(rows, "staleness_max") and ages[1] >= 1
    assert column(rows, "dropped") == [0] * 6 and not threads()
    assert all(row["trainer_wait"] >= 0 and row["sampler_wait"] >= 0 for row in rows)
    assert column(plain, "sampled_at") == list(range(6)) and "staleness" not in plain[0]


def test_a_sampler_that_is_slow_waits_for_nobody_and_starts_no_more_than_the_bound():
    sampler = Sampler(slow=True)
    done = []
    batches = rl.collect(PROMPTS, sampler, CREDIT, max_staleness=1)
    take = lambda carry, w: batches({"w": jnp.float32(w)}, carry, jax.random.key(0))
    sampler.turns.release()
    _, carry = take(batches.carry, 0)
    # The second rollout is sampled while the first one trains; the third must wait for new params.
    assert all(sampler.started.acquire(timeout=60) for _ in range(2))
    sampler.turns.release()
    batch, carry = take(carry, 1)
    assert sampler.started.acquire(timeout=60) and len(sampler.asked) == 3
    assert [w for _, w, _ in sampler.asked] == [0, 0, 1]
    assert batch["policy_version"].tolist() == [0, 0]
    worker = threading.Thread(target=lambda: done.append(batches.close()))
    worker.start()
    sampler.turns.release()
    worker.join(60)
    assert done and not threads()


def test_at_staleness_zero_no_thread_runs_and_the_keys_are_those_of_the_steps():
    sampler = Sampler()
    run(sampler, steps=3)
    key = lambda step: jax.random.bits(stream(jax.random.key(0), "collect", step)).item()
    assert [bits for *_, bits in sampler.asked] == [key(step) for step in range(3)]


def test_a_run_resumed_from_its_carry_repeats_and_loses_no_draw(tmp_path):
    whole = column(run(Sampler(), most=2), "prompt")
    kept = lambda resume: Checkpoints(tmp_path, every=1, resume=resume)
    first = Sampler()

    def killed(row):
        if row["step"] == 3:
            raise KeyboardInterrupt  # Rollouts sampled ahead are lost, as by SIGKILL.

    with pytest.raises(KeyboardInterrupt):
        run(first, most=2, checkpoints=kept(False), callbacks=[killed])
    assert not threads()
    again = Sampler()
    rows = run(again, most=2, checkpoints=kept(True))
    assert column(rows, "prompt") == whole and column(rows, "step") == list(range(1, 7))
    assert max(column(rows, "staleness")) <= 2
    # It starts at the draw after the last one that a saved step trained on.
    step = len(whole) - len(again.asked)
    assert step in (2, 3) and again.asked[0][0][0][0] == whole[step]


def test_an_error_of_the_sampler_is_raised_in_training():
    def fails(number):
        if number == 3:
            raise OSError("the sampler broke")
        return np.zeros(GROUP)

    with pytest.raises(OSError, match="the sampler broke") as caught:
        run(Sampler(rewards=fails), most=1)
    assert any("in training, at step 2" in note for note in caught.value.__notes__)
    assert not threads()


def test_rollouts_of_versions_that_are_too_old_are_dropped_and_drawn_again():
    # The third call reports weights that never arrived; the fourth repeats its prompts.
    reported = lambda number: np.full(GROUP, -9 if number == 3 else 100)
    sampler = Sampler(policy_version=reported)

    trained = []

    def third_began(batch, params, key):
        # Else, with the second rollout trained on, its successor could be sampled by the newest params.
        trained.append(batch)
        while len(trained) == 2 and len(sampler.asked) < 3:
            assert sampler.started.acquire(timeout=60)
        return batch

    rows = run(sampler, most=1, transforms=[third_began])
    assert column(rows, "prompt") == column(run(Sampler()), "prompt")
    assert column(rows, "dropped") == [0, 0, 1, 0, 0, 0]
    with pytest.raises(RuntimeError, match="reports policy_version -9 .* max_staleness is 1"):
        run(Sampler(policy_version=np.full(GROUP, -9)), most=1)


def test_tokens_that_are_too_old_leave_the_loss_and_stay_in_the_row():
    versions = np.array([[-5, 0, 0], [0, 0, 0]])
    batches = rl.collect(
        PROMPTS, Sampler(policy_version=versions), CREDIT, max_staleness=1, rollouts=1
    )
    batch, _ = batches({"w": jnp.zeros(())}, batches.carry, jax.random.key(0))
    batches.close()
    assert batch["completion_mask"].tolist() == [[False, True, True], [True] * 3]
    np.testing.assert_allclose(batch["stats"]["stale_tokens"], [1 / 3, 0])
    np.testing.assert_allclose(batch["stats"]["staleness"], [5 / 3, 0])
    assert batch["stats"]["staleness_max"].tolist() == [5, 5]
    assert batch["advantages"].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("own", [np.zeros((GROUP, 1), int), np.zeros(GROUP)])
def test_versions_of_another_shape_or_type_are_an_error(own):
    with pytest.raises(ValueError, match=r"policy_version must be whole numbers \[B\] or \[B, N\]"):
        run(Sampler(policy_version=own), most=1)


def test_several_updates_score_the_old_policy_with_the_params_that_train():
    seen = []

    def old(batch, params, key):
        seen.append(float(params["w"]))
        return batch | {"old_log_probs": np.full((GROUP, SIZE), np.float32(params["w"]))}

    batches = rl.collect(PROMPTS, Sampler(), CREDIT, old, updates=2, max_staleness=1, rollouts=3)
    objective = lambda params, batch, key: (
        params["w"],
        {"w": truncated_weights(batch["old_log_probs"], batch["sampler_log_probs"]).mean()},
    )
    rows = fit({"w": jnp.zeros(())}, objective, optax.sgd(-0.1), batches, steps=6)[1]
    np.testing.assert_allclose(seen, [0, 0.2, 0.4], atol=1e-6)
    # The sampler's params are those before the rollout before: 0.2 older, from the second rollout on.
    np.testing.assert_allclose(column(rows, "w"), np.exp([0, 0, 0.2, 0.2, 0.2, 0.2]), rtol=1e-5)


def test_the_gradient_is_that_of_the_decoupled_objective():
    """w ∇(ratio A) with w = min(π_proximal / π_sampler, 2), by finite log-probs of another policy."""
    model, params = model_and_params()
    tokens = np.array([[1, 6, 2, 3, 7], [2, 6, 1, 1, 7]], np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(5), tokens.shape),
        "completion_mask": np.ones((2, 3), bool),
        "sampler_log_probs": np.full((2, 3), -2.0, np.float32),
        "advantages": np.array([1.0, -0.5], np.float32),
        "policy_version": np.zeros(2, np.int32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    log_probs = lambda p: rl.policy_log_probs(model.forward, p, model_inputs(batch))
    built = policy_gradient(model.forward, clipped(), token_mean, correction=token_correction())
    weights = truncated_weights(log_probs(params), batch["sampler_log_probs"])
    wanted = jax.grad(lambda p: -jnp.mean(weights * log_probs(p) * batch["advantages"][:, None]))
    found = jax.grad(lambda p: built(p, batch, jax.random.key(0))[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted(params))


@pytest.mark.parametrize(
    "most, mesh, message", [(-1, None, "at least 0, got -1"), (1, 2, "one device")]
)
def test_what_is_not_supported_is_refused(most, mesh, message):
    mesh = mesh and make_mesh(data=mesh, devices=jax.devices()[:mesh])
    with pytest.raises(ValueError, match=message):
        rl.collect(PROMPTS, Sampler(), CREDIT, max_staleness=most, mesh=mesh)
