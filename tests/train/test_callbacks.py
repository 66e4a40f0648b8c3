import jax.numpy as jnp
import optax
import pytest

from jaxft.metrics import Mean
from jaxft.train import Callback, at_steps, fit, log_spaced, profile
from jaxft.train import rows as rows_module
from jaxft.train.accumulation import as_means
from jaxft.train.callbacks import on_main_process
from jaxft.train.rows import Rows


def test_profile_traces_a_window_of_steps(problem, monkeypatch, tmp_path):
    import jax

    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: events.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    look = Callback(on_step=lambda step, state: events.append(step))
    args = problem.make_params(), problem.objective, optax.sgd(0.1)
    batches = [problem.make_batch(n) for n in range(5)]
    fit(*args, batches, callbacks=[look, profile(tmp_path, start=2, stop=4)])
    assert events == [1, 2, str(tmp_path), 3, 4, "stop", 5]
    events.clear()
    fit(*args, batches[:3], callbacks=[profile(tmp_path, start=2, stop=9)])
    assert events == [str(tmp_path), "stop"]


def test_profile_writes_a_trace(problem, tmp_path):
    batches = [problem.make_batch(n) for n in range(4)]
    args = problem.make_params(), problem.objective, optax.sgd(0.1)
    fit(*args, batches, callbacks=[profile(tmp_path, start=1, stop=3)])
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_a_bad_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 5 and 5"):
        profile(tmp_path, start=5, stop=5)


def test_other_processes_do_not_write(monkeypatch):
    import jax

    calls = []
    callback = on_main_process(Callback(on_row=calls.append))
    callback.on_row("zero")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    callback.on_row("one")
    assert calls == ["zero"] and callback.on_start is None


@pytest.mark.parametrize("total", [jnp.int32(3), jnp.uint8(3), jnp.float32(3), jnp.bfloat16(3)])
@pytest.mark.parametrize("weight", [jnp.int32(4), jnp.float32(4)])
def test_a_metric_may_be_a_count(total, weight):
    rows, none = Rows([]), Mean(total, jnp.zeros_like(weight))
    metrics = {"right": Mean(total, weight), "none": none, "any": Mean(jnp.array(True), weight)}
    rows.push(1, metrics | {"number": total, "good": jnp.array(True)}, {})
    rows.flush()
    (row,) = rows.history
    assert (row["right"], row["none"], row["any"], row["number"]) == (0.75, 0, 0.25, 3)
    # And of slices, whose totals are added up.
    assert as_means(metrics | {"loss": jnp.float32(1)})["right"].value == 0.75


@pytest.mark.parametrize("ready, wanted", [(True, [10, 7, 5]), (False, [17, 5, 0])])
def test_seconds_of_a_step_begin_at_the_end_of_the_step_before(monkeypatch, ready, wanted):
    """A step that has ended when it is dispatched is not timed by the next one."""
    clock = [0.0]
    monkeypatch.setattr(rows_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(rows_module, "_are_ready", lambda metrics: ready)
    rows = rows_module.Rows([])
    for number, seconds in enumerate((10, 7, 5), 1):
        clock[0] += seconds
        rows.push(number, {"loss": jnp.ones(()), "good": jnp.array(True)}, {})
    rows.flush()
    assert [row["seconds"] for row in rows.history] == wanted


def test_a_function_is_called_at_the_given_steps_and_at_an_early_end(problem):
    args = problem.make_params(), problem.objective, optax.sgd(0.1)
    batches = [problem.make_batch(n) for n in range(7)]
    look = at_steps((1, 2, 5, 7), lambda state: {"seen": int(state.step)})
    _, history = fit(*args, batches, steps=7, callbacks=[look])
    assert {row["step"]: row["seen"] for row in history if "seen" in row} == {
        1: 1,
        2: 2,
        5: 5,
        7: 7,
    }
    for number, seen in ((6, [1, 2, 5, 6]), (5, [1, 2, 5])):  # The batches end before step 7.
        _, history = fit(*args, batches[:number], callbacks=[look])
        assert [row["seen"] for row in history if "seen" in row] == seen
    with pytest.raises(ValueError, match="step 7 is after the run's last step 6"):
        fit(*args, batches, steps=6, callbacks=[look])


@pytest.mark.parametrize("steps", [(), (0, 1), (2, 1), (1, 1)])
def test_steps_that_do_not_increase_are_refused(steps):
    with pytest.raises(ValueError, match="must increase from 1 on"):
        at_steps(steps, lambda state: {})


@pytest.mark.parametrize(
    "total, share, expected",
    [
        (100, 0.05, [1, 2, 4, *range(5, 101, 5)]),
        (150, 0.2, [1, 2, 4, 8, 16, 30, 60, 90, 120, 150]),
        (7, 0.3, [1, 2, 4, 6, 7]),
        (3, 0.05, [1, 2, 3]),
        (1, 1.0, [1]),
        (64, 1.0, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_logarithmic_steps_end_in_equal_ones(total, share, expected):
    assert list(log_spaced(total, share)) == expected


def test_bad_totals_are_refused():
    with pytest.raises(ValueError, match="got 0 and 0.05"):
        log_spaced(0)
