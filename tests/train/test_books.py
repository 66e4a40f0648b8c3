"""Books of the carry: against closed forms, and the same for any cut of the batch, mesh and interruption."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import train
from jaxft.metrics import Mean, Terms
from jaxft.parallel import make_mesh
from jaxft.train import (
    Book,
    Checkpoints,
    fit,
    init_state,
    make_step,
    moving_reference,
    running_mean,
)

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}


@pytest.mark.parametrize("alpha, every", [(0.6, 1), (0.3, 3), (1.0, 2)])
def test_a_moving_reference_is_the_sum_of_what_it_has_seen(alpha, every):
    book = moving_reference(None, alpha, every)
    entry, rng = book.start(PARAMS), np.random.default_rng(0)
    seen = [PARAMS]
    for number in range(1, 8):
        new = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), PARAMS)
        entry = jax.jit(book.update)(entry, new, {})
        seen += [new] if number % every == 0 else []
        moves = len(seen) - 1
        # (1 - α)^m θ_0 + α Σ_j (1 - α)^(m - j) θ_j over the m steps at which it moved
        weights = [(1 - alpha) ** moves] + [
            alpha * (1 - alpha) ** (moves - j) for j in range(1, moves + 1)
        ]
        terms = [jax.tree.map(lambda x, w=w: w * x, s) for w, s in zip(weights, seen, strict=True)]
        wanted = jax.tree.map(lambda *x: sum(x), *terms)
        chex.assert_trees_all_close(entry[1], wanted, rtol=1e-5)
        if alpha == 1:  # a hard move is the params themselves, bit for bit
            chex.assert_trees_all_equal(entry[1], seen[-1])
    assert int(entry[0]) == 7


def test_a_running_mean_is_that_of_all_parts():
    book = running_mean("reward")
    entry, rng, values = book.start(PARAMS), np.random.default_rng(0), []
    for size in (3, 1, 0, 5):
        values.append(rng.normal(100.0, 1.0, size))
        part = Mean(jnp.sum(jnp.asarray(values[-1])), jnp.float32(size))
        entry = book.update(entry, PARAMS, {"reward": part})
        everything = np.concatenate(values)
        assert float(entry[0]) == pytest.approx(everything.mean(), rel=1e-6)
        assert float(entry[1]) == len(everything)
    assert book.give(entry, PARAMS, {}) == {"running": entry}


def test_a_running_mean_takes_terms_and_numbers():
    one, two = (Mean(jnp.float32(t), jnp.float32(w)) for t, w in [(6.0, 3.0), (5.0, 1.0)])
    metrics = {"loss": Terms((one, two)), "size": jnp.float32(4.0)}
    for name, wanted in [("loss", (7.0, 3.0)), ("size", (4.0, 1.0))]:
        book = running_mean(name)
        assert tuple(map(float, book.update(book.start(PARAMS), PARAMS, metrics))) == wanted
    with pytest.raises(ValueError, match=r"no metric 'kl'; there are \['loss', 'size'\]"):
        running_mean("kl").update((0.0, 0.0), PARAMS, metrics)


def follower():
    """Gives a column and a scalar; keeps the bias, how often it was updated, and the last loss."""

    def give(entry, params, batch):
        del params
        rows = batch["x"][:, 0, 0] * jnp.sum(entry["bias"])
        return {"shift": rows, "level": jnp.asarray(entry["number"], jnp.float32)}

    def update(entry, trainable, metrics):
        bias = jax.tree.leaves(trainable["first"]["bias"])[0]
        return {"bias": bias, "number": entry["number"] + 1, "loss": metrics["loss"].value}

    start = lambda params: {
        "bias": params["first"]["bias"],
        "number": jnp.zeros((), jnp.int32),
        "loss": jnp.zeros(()),
    }
    return {"follower": Book(start, give, update)}


def shifted(problem):
    def objective(params, batch, key):
        shift = batch["shift"][:, None, None] + 0.01 * batch["level"]
        return problem.quiet(params, {**batch, "y": batch["y"] + shift}, key)

    return objective


def run(problem, batches, state=None, **options):
    params = problem.make_params() if state is None else state
    args = params, shifted(problem), optax.adam(1e-2), batches
    return fit(*args, books=follower(), **options)


def test_books_give_what_a_loop_gives(problem):
    batches = [problem.make_batch(n) for n in range(4)]
    state, history = run(problem, batches)
    # The slow twin: the host adds to the batch and keeps the entry itself.
    step = train.jit_step(make_step(shifted(problem), optax.adam(1e-2)))
    plain = init_state(problem.make_params(), optax.adam(1e-2), jax.random.key(0))
    for number, (batch, row) in enumerate(zip(batches, history, strict=True)):
        shift = batch["x"][:, 0, 0] * np.asarray(jnp.sum(plain.params["first"]["bias"]))
        plain, metrics = step(plain, {**batch, "shift": shift, "level": np.float32(number)})
        np.testing.assert_allclose(row["loss"], metrics["loss"].value, rtol=1e-5)
    assert abs(history[-1]["loss"] - problem_loss(problem, plain, batches[-1])) > 1e-4
    entry = state.carry["follower"]
    chex.assert_trees_all_equal(entry["bias"], state.params["first"]["bias"])
    assert int(entry["number"]) == 4
    assert float(entry["loss"]) == pytest.approx(history[-1]["loss"], rel=1e-6)


def problem_loss(problem, state, batch):
    return float(problem.quiet(state.params, batch, None)[0])


@pytest.mark.parametrize("microbatches, mesh", [(4, None), (1, 4), (2, 4)])
def test_slices_and_meshes_change_nothing(problem, microbatches, mesh):
    batches = [problem.make_batch(n) for n in range(3)]
    one = run(problem, batches)
    mesh = mesh and make_mesh(data=mesh, devices=jax.devices()[:mesh])
    other = run(problem, batches, microbatches=microbatches, mesh=mesh)
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)
    close(jax.device_get(one[0].carry), jax.device_get(other[0].carry))
    close([row["loss"] for row in one[1]], [row["loss"] for row in other[1]])


def test_a_bad_step_leaves_the_books(problem):
    good, bad = problem.make_batch(0), problem.make_batch(1)
    bad["y"] = bad["y"] * np.nan
    step = jax.jit(make_step(shifted(problem), optax.adam(1e-2), books=follower()))
    params = problem.make_params()
    state = init_state(params, optax.adam(1e-2), jax.random.key(0), books=follower())
    state, _ = step(state, good)
    for after, metrics in (step(state, bad), step(state, good, False)):
        assert not metrics["good"]
        chex.assert_trees_all_equal(after.carry, state.carry)
    assert step(state, good)[0].carry["follower"]["number"] == 2


def test_books_stand_beside_the_user_s_carry_and_are_resumed(problem, tmp_path):
    batches = [problem.make_batch(n) for n in range(4)]
    carry = {"mine": jnp.arange(3)}

    def go(steps, directory):
        options = dict(key=jax.random.key(0), carry=carry, books=follower())
        state = init_state(problem.make_params(), optax.adam(1e-2), **options)
        checkpoints = Checkpoints(tmp_path / directory, resume=True)
        return run(problem, itertools.cycle(batches), state, steps=steps, checkpoints=checkpoints)

    whole, history = go(4, "whole")
    go(2, "cut")
    resumed, again = go(4, "cut")
    chex.assert_trees_all_equal(whole.carry, resumed.carry)
    assert [row["loss"] for row in history] == [row["loss"] for row in again]
    chex.assert_trees_all_equal(whole.carry["mine"], carry["mine"])
    assert set(whole.carry) == {"mine", "follower"}


def test_mistakes_are_explained(problem):
    for wrong in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
            moving_reference(None, *wrong)
    args = problem.make_params(), optax.sgd(0.1), jax.random.key(0)
    for carry, message in [([1.0], "got list"), ({"follower": 1.0}, r"got \['follower'\]")]:
        with pytest.raises(ValueError, match=message):
            init_state(*args, carry, books=follower())
    step = make_step(shifted(problem), optax.sgd(0.1), books=follower())
    with pytest.raises(ValueError, match=r"no entries \['follower'\].*books=books"):
        step(init_state(*args), problem.make_batch(0))
    with pytest.raises(
        ValueError, match=r"'follower' gives \['shift'\], which the batch already has"
    ):
        batch = problem.make_batch(0) | {"shift": np.zeros(problem.ROWS)}
        step(init_state(*args, books=follower()), batch)


@pytest.mark.parametrize(
    "start, update, said",
    [
        (0, lambda e: e + 0.5, r"'the entry' from int32\[\] to float32\[\]"),
        (jnp.zeros(3), lambda e: e[:2], r"'the entry' from float32\[3\] to float32\[2\]"),
        (jnp.zeros(3), lambda e: jnp.float32(1), r"from float32\[3\] to float32\[\]"),
        ({"a": jnp.int8(1)}, lambda e: {"a": jnp.int32(1)}, r"'a' from int8\[\] to int32\[\]"),
        ({"a": 1, "b": 1}, lambda e: {"a": e["a"]}, r"'b' from int32\[\] to nothing"),
        ({"a": 1}, lambda e: {**e, "b": 1}, r"'b' from nothing to int32\[\]"),
        ((1, 1), list, r"changes the structure from .*\(\*, \*\)"),
    ],
)
def test_an_update_that_changes_the_type_of_its_entry_is_refused(start, update, said):
    book = Book(lambda params: start, lambda e, params, batch: {}, lambda e, *_: update(e))
    objective = lambda params, batch, key: (jnp.sum(params["w"] ** 2) * batch["x"], {})
    args = PARAMS, objective, optax.sgd(0.1), [{"x": 1.0}]
    with pytest.raises(ValueError, match="the update of book 'mine' changes .*") as caught:
        fit(*args, books={"mine": book})
    assert re.search(said, str(caught.value))


def test_an_update_may_give_python_numbers_and_what_its_entry_can_hold():
    start = {"a": jnp.bfloat16(1), "b": 2, "c": jnp.float32(0)}
    update = lambda e, *_: {"a": 0.5 + 0 * e["a"], "b": 7, "c": jnp.int32(3)}
    book = Book(lambda params: start, lambda e, params, batch: {}, update)
    objective = lambda params, batch, key: (jnp.sum(params["w"] ** 2) * batch["x"], {})
    state, _ = fit(PARAMS, objective, optax.sgd(0.1), [{"x": 1.0}] * 2, books={"mine": book})
    assert jax.tree.map(lambda x: (str(x.dtype), float(x)), state.carry["mine"]) == {
        "a": ("bfloat16", 0.5),
        "b": ("int32", 7.0),
        "c": ("float32", 3.0),
    }


def test_books_need_batches_with_names():
    objective = lambda params, batch, key: (jnp.sum(params["w"] ** 2) * batch[0], {})
    args = PARAMS, objective, optax.sgd(0.1), [(1.0, 2.0)]
    with pytest.raises(ValueError, match=r"books \['mean'\] add columns .* a dict .* got tuple"):
        fit(*args, books={"mean": running_mean("loss")})
