import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.adapters import partition
from jaxft.keys import stream
from jaxft.parallel import make_mesh, shard_params
from jaxft.train import (
    Callback,
    DivergedError,
    fit,
    init_state,
    make_optimizer,
    make_step,
    run_steps,
)


@pytest.fixture
def optimizer():
    return make_optimizer(1e-2, total_steps=10, weight_decay=0.1)


def losses(history):
    return [row["loss"] for row in history]


def test_fit_is_its_step_repeated(problem, optimizer, key):
    batches = [problem.make_batch(n) for n in range(5)]
    params = problem.make_params()
    state, history = fit(params, problem.objective, optimizer, batches, key=key)
    expected, step = (
        init_state(params, optimizer, key),
        jax.jit(make_step(problem.objective, optimizer)),
    )
    for batch, row in zip(batches, history, strict=True):
        expected, metrics = step(expected, batch)
        assert row["loss"] == metrics["loss"].value
        assert row["largest"] == metrics["largest"]
    chex.assert_trees_all_close(state[:3], expected[:3], rtol=1e-6)
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "seconds"} <= set(history[0])
    assert all(isinstance(v, (int, float)) for row in history for v in row.values())
    # The caller's params are still there.
    chex.assert_trees_all_equal(params, problem.make_params())


def test_fit_goes_on_from_a_state(problem, optimizer, key):
    whole = fit(
        problem.make_params(), problem.objective, optimizer, problem.Batches(), steps=6, key=key
    )
    batches = problem.Batches()
    state, first = fit(
        problem.make_params(), problem.objective, optimizer, batches, steps=4, key=key
    )
    state, second = fit(state, problem.objective, optimizer, batches, steps=6)
    assert losses(first + second) == losses(whole[1])
    chex.assert_trees_all_equal(state, whole[0])


def counting(problem):
    """collect: the next batch of the problem, counted in the carry."""

    def collect(params, carry, key):
        number = carry["taken"] + 1
        return problem.make_batch(int(number)), {**carry, "taken": number}

    collect.carry = {"taken": np.int32(0)}
    return collect


def test_batches_may_be_a_collect_function(problem, optimizer, key):
    args = problem.make_params(), problem.objective, optimizer
    state, history = fit(*args, counting(problem), steps=4, key=key, carry={"own": jnp.ones(2)})
    assert losses(history) == losses(fit(*args, problem.Batches(), steps=4, key=key)[1])
    assert state.carry["taken"] == 4 and state.carry["own"].tolist() == [1, 1]
    # A state continues where it was.
    _, more = fit(state, problem.objective, optimizer, counting(problem), steps=6)
    assert losses(more) == losses(fit(*args, problem.Batches(), steps=6, key=key)[1][4:])
    with pytest.raises(ValueError, match="never ends; pass steps"):
        fit(*args, counting(problem))
    with pytest.raises(ValueError, match="a dict of named entries; got tuple"):
        fit(*args, counting(problem), steps=1, carry=(jnp.ones(2),))


def test_what_collect_returns_is_checked_and_may_share_memory(problem, optimizer, key):
    args = problem.make_params(), problem.objective, optimizer
    keys = []

    def aliasing(params, carry, key):
        keys.append(key)
        batch = jax.tree.map(jnp.asarray, problem.make_batch(1))
        return batch, {"batch": batch, "params": params, "again": batch}

    start = {"batch": problem.make_batch(1), "params": args[0], "again": problem.make_batch(1)}
    state, _ = fit(*args, aliasing, steps=3, key=key, carry=start)
    jax.block_until_ready(state)
    assert keys == [stream(key, "collect", step) for step in range(3)]
    grows = lambda params, carry, key: (problem.make_batch(1), jnp.zeros(len(carry) + 1))
    with pytest.raises(ValueError, match=r"was float32\[1\] and is now float32\[2\]"):
        fit(*args, grows, steps=2, carry=jnp.zeros(1))
    loses = lambda params, carry, key: (problem.make_batch(1), {})
    with pytest.raises(ValueError, match="has no 'x' any more"):
        fit(*args, loses, steps=2, carry={"x": jnp.zeros(1)})


def test_batches_that_end_early_warn(problem, optimizer):
    args = problem.make_params(), problem.objective, optimizer
    with pytest.warns(UserWarning, match="ended after 2 of 5 steps"):
        state, _ = fit(*args, [problem.make_batch(n) for n in range(2)], steps=5)
    assert state.step == 2


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_mesh_gives_the_losses_of_one_device(problem, optimizer, key, microbatches):
    batches = [problem.make_batch(n, rows=16) for n in range(4)]
    options = dict(key=key, microbatches=microbatches)
    one, expected = fit(problem.make_params(), problem.objective, optimizer, batches, **options)
    mesh = make_mesh(data=4, fsdp=2)
    rules = [("second/kernel", jax.P("fsdp", None)), (".*", jax.P())]
    params = shard_params(problem.make_params(), mesh, rules)
    many, history = fit(params, problem.objective, optimizer, batches, mesh=mesh, **options)
    np.testing.assert_allclose(losses(history), losses(expected), rtol=1e-5)
    chex.assert_trees_all_close(
        partition(many.params)[0], partition(one.params)[0], rtol=1e-3, atol=1e-5
    )
    assert many.params["second"]["kernel"].value.sharding.spec == jax.P("fsdp", None)


def test_shardings_stay_and_nothing_compiles_again_on_a_mesh(problem, key):
    traces = []

    def objective(params, batch, key):
        traces.append(1)
        return jnp.mean((batch["x"] @ params["kernel"]) ** 2), {}

    mesh = make_mesh(data=4, fsdp=2)
    params = shard_params({"kernel": jnp.ones((6, 6))}, mesh, [(".*", jax.P("fsdp", None))])
    seen = []
    look = Callback(
        on_step=lambda step, state: seen.append(jax.tree.map(lambda x: x.sharding, state))
    )
    batches = [problem.make_batch(n) for n in range(4)]
    state, _ = fit(
        params, objective, optax.adam(1e-2), batches, key=key, mesh=mesh, callbacks=[look]
    )
    assert len(traces) == 1
    assert all(shardings == seen[0] for shardings in seen)
    moments = state.opt_state[0].mu["kernel"]
    assert moments.sharding.spec == state.params["kernel"].sharding.spec == jax.P("fsdp", None)


def test_rows_that_the_mesh_does_not_divide_are_refused(problem, optimizer):
    mesh = make_mesh(data=4, fsdp=2)
    with pytest.raises(ValueError, match=r"12 rows of 'weights' .* data x fsdp x expert = 8"):
        fit(
            problem.make_params(),
            problem.objective,
            optimizer,
            [problem.make_batch(0, 12)],
            mesh=mesh,
        )


def test_a_loss_that_is_not_finite_ends_the_run_at_the_state_before(problem, optimizer, key):
    batches = [problem.make_batch(n) for n in range(6)]
    batches[3]["x"][1, 0, 0] = np.nan
    args = problem.make_params(), problem.objective, optimizer
    with pytest.raises(DivergedError, match=r"diverged at step 4: loss and grad_norm") as caught:
        fit(*args, batches, key=key)
    good, history = fit(*args, batches[:3], key=key)
    assert caught.value.step == 4
    chex.assert_trees_all_equal(caught.value.state, good)
    assert losses(caught.value.history) == losses(history)


def test_divergence_at_the_last_step_is_seen(problem, optimizer):
    batches = [problem.make_batch(n) for n in range(2)]
    batches[1]["y"][1] = np.inf
    with pytest.raises(DivergedError, match="step 2"):
        fit(problem.make_params(), problem.objective, optimizer, batches)


def test_rows_come_one_step_late_so_that_the_device_never_waits(problem, optimizer):
    events = []
    callback = Callback(
        on_start=lambda run: events.append(("start", run.first_step, run.steps)),
        on_step=lambda step, state: events.append(("step", step)) or {"extra": step * 10},
        on_row=lambda row: events.append(("row", row["step"], row["extra"])),
        on_end=lambda error: events.append(("end", error)),
    )
    batches, rows = [problem.make_batch(n) for n in range(3)], []
    args = problem.make_params(), problem.objective, optimizer, batches
    fit(*args, steps=3, callbacks=[callback, rows.append])
    assert events == [
        ("start", 0, 3),
        ("step", 1),
        ("step", 2),
        ("row", 1, 10),
        ("step", 3),
        ("row", 2, 20),
        ("row", 3, 30),
        ("end", None),
    ]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_callbacks_end_with_the_error_of_the_run(problem, optimizer):
    ends = []
    callback = Callback(on_end=ends.append, on_step=lambda step, state: {"x": 1 / (step - 2)})
    with pytest.raises(ZeroDivisionError) as caught:
        batches = [problem.make_batch(n) for n in range(3)]
        fit(problem.make_params(), problem.objective, optimizer, batches, callbacks=[callback])
    assert ends == [caught.value]
    assert caught.value.__notes__ == ["in training, at step 2"]


def test_no_step_waits_for_its_own_metrics(problem, optimizer, monkeypatch):
    """The host may fetch the numbers of step k only after step k + 1 has been dispatched."""
    from jaxft.train import rows as rows_module

    order = []
    number = rows_module._number
    monkeypatch.setattr(rows_module, "_number", lambda v: order.append("fetch") or number(v))
    look = Callback(on_step=lambda step, state: order.append(step))
    fit(
        problem.make_params(),
        problem.objective,
        optimizer,
        [problem.make_batch(n) for n in range(3)],
        callbacks=[look],
    )
    squeezed = [e for i, e in enumerate(order) if i == 0 or e != order[i - 1]]
    assert squeezed == [1, 2, "fetch", 3, "fetch"]


def test_a_step_of_the_user_s_is_counted_and_stopped_before_a_metric_that_is_not_finite(key):
    def step(state, batch):
        total = state.carry + batch
        return state._replace(carry=total), {"root": jnp.sqrt(10.0 - total)}

    start = lambda: init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), key, carry=jnp.zeros(()))
    done, history = run_steps(start(), step, [1.0, 2.0, 3.0])
    assert int(done.step) == 3 and float(done.carry) == 6.0
    assert [row["root"] for row in history] == pytest.approx([3.0, 7.0**0.5, 2.0])
    with pytest.raises(DivergedError, match="root not finite") as caught:
        run_steps(start(), step, [1.0, 2.0, 8.0, 9.0])
    assert int(caught.value.state.step) == 2 and float(caught.value.state.carry) == 3.0


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s, b: s._replace(carry=s.carry + 0.5), r"'carry' from int32\[\] to float32\[\]"),
        (lambda s, b: s._replace(carry=s.carry + b), r"'carry' from int32\[\] to int32\[2\]"),
        (lambda s, b: s._replace(params={"w": s.params["w"][:1]}), r"'params/w' from float32\[2\]"),
        (lambda s, b: s._replace(carry=None), r"'carry' from int32\[\] to nothing"),
    ],
)
def test_a_step_of_the_user_s_that_changes_the_type_of_the_state_is_refused(key, change, said):
    state = init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), key, carry=0)
    step = lambda state, batch: (change(state, batch), {"x": jnp.zeros(())})
    with pytest.raises(ValueError, match="run_steps: the step changes " + said):
        run_steps(state, step, [jnp.ones(2, jnp.int32)])


def test_a_carry_with_a_typed_key_is_refused(key):
    with pytest.raises(ValueError, match="carry has a typed key at 'noise'"):
        init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), key, carry={"noise": key})


def plain_fit(batches, **options):
    objective = lambda p, batch, key: (jnp.sum(p["w"]) * batch["x"], {})
    return fit({"w": jnp.ones(2)}, objective, optax.sgd(0.1), batches, **options)


def test_a_state_or_params_that_a_run_used_up_are_refused_by_name(key):
    objective, args = lambda p, batch, key: (jnp.sum(p["w"] * batch), {}), (optax.sgd(0.1), [1.0])
    state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), key)
    fit(state, objective, *args)
    with pytest.raises(ValueError, match="arrays of this TrainState were deleted: an earlier run"):
        fit(state, objective, *args)
    params = {"w": jnp.ones(2)}
    fit(params, objective, *args, donate=True)
    with pytest.raises(ValueError, match="arrays of these params were deleted: an earlier run"):
        fit(params, objective, *args)


def test_batches_that_are_one_batch_are_refused():
    with pytest.raises(ValueError, match=r"one dict, with \['x', 'y'\], whose keys would be"):
        plain_fit({"x": 1.0, "y": 2.0})
    collect = lambda params, carry, key: {"x": 1.0, "y": 2.0}  # without the carry
    with pytest.raises(ValueError, match=r"must return \(batch, carry\), got one dict, with \['x'"):
        plain_fit(collect, steps=2)
    with pytest.raises(ValueError, match=r"must return \(batch, carry\), got float"):
        plain_fit(lambda *_: 1.0, steps=2)


@pytest.mark.parametrize("mesh", [None, "data"])
@pytest.mark.parametrize("text", ["abc", ["a", "b"], np.array(["a"]), np.array([None])])
def test_a_column_of_text_is_refused_by_name(text, mesh):
    mesh = mesh and make_mesh(data=8)
    with pytest.raises(ValueError, match="fit: 'name(/0)?' of the batch has .* only numbers"):
        plain_fit([{"x": 1.0, "name": text}], mesh=mesh)
    few = {"x": 1.0, "name": np.zeros(8, jnp.bfloat16), "flag": True, "none": None}
    assert len(plain_fit([few], mesh=mesh)[1]) == 1


@pytest.mark.parametrize("name", ["step", "seconds", "good", "grad_norm"])
def test_a_metric_with_the_name_of_a_row_s_own_is_refused_at_the_first_step(name):
    objective = lambda p, batch, key: (jnp.sum(p["w"] * batch), {name: jnp.float32(7)})
    seen = []
    with pytest.raises(ValueError, match=f"gives a metric '{name}', a name that the row"):
        fit({"w": jnp.ones(2)}, objective, optax.sgd(0.1), [1.0] * 3, callbacks=[seen.append])
    assert not seen


def test_a_user_s_step_may_not_have_the_loop_s_metrics_either(key):
    for name in ("step", "seconds", "good"):
        state = init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), key)
        step = lambda state, batch, name=name: (state, {name: jnp.zeros(())})
        with pytest.raises(ValueError, match=f"the step gives a metric '{name}'"):
            run_steps(state, step, [1.0])


@pytest.mark.parametrize("when", ["on_step", "on_last"])
@pytest.mark.parametrize("name", ["step", "seconds", "loss"])
def test_a_callback_may_not_replace_what_a_row_has(when, name):
    objective = lambda p, batch, key: (jnp.sum(p["w"] * batch), {})
    callback = Callback(**{when: lambda step, state: {name: 7.0}})
    with pytest.raises(ValueError, match=f"a callback gives a metric '{name}'"):
        fit({"w": jnp.ones(2)}, objective, optax.sgd(0.1), [1.0, 1.0], callbacks=[callback])


@pytest.mark.parametrize("mesh", [None, "fsdp"])
def test_donated_params_are_the_only_model(mesh):
    bias = jnp.zeros(256)
    # Two places of one array: on a mesh they are two arrays over one buffer.
    params = {"w": jax.random.normal(jax.random.key(0), (256, 256)), "b": bias, "tied": bias}
    if mesh:
        mesh = make_mesh(fsdp=8)
        params = shard_params(params, mesh)
    start = jax.tree.map(jnp.copy, params)
    objective = lambda p, batch, key: (
        jnp.mean((batch @ p["w"] + (p["b"] + p["tied"])[None]) ** 2),
        {},
    )
    batches = [jnp.ones((8, 256))] * 3
    live = lambda: sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())
    seen, before = [], live()

    def look(step, state):
        jax.block_until_ready(state)
        seen.append((live() - before, params["w"].is_deleted()))

    settings = dict(mesh=mesh, callbacks=[Callback(on_step=look)])
    kept, _ = fit(start, objective, optax.sgd(0.1), batches, mesh=mesh)
    assert not start["w"].is_deleted()
    before = live()
    donated, _ = fit(params, objective, optax.sgd(0.1), batches, donate=True, **settings)
    chex.assert_trees_all_equal(donated.params, kept.params)
    assert all(deleted for _, deleted in seen)
    # Metrics, the step, `b` and a batch; a second model would be 4 * 256 * 256.
    assert max(more for more, _ in seen) < 2 * 256 * 256
