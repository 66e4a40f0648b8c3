import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.keys import stream
from jaxft.parallel import make_mesh
from jaxft.train import Checkpoints, evaluate, evaluation, every, fit, jsonl_log, make_eval_step


def rows_of(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def test_the_result_does_not_depend_on_how_the_data_are_cut(problem):
    params, batch = problem.make_params(), problem.make_batch(0, rows=16)
    eval_step = make_eval_step(problem.quiet)
    whole = evaluate(eval_step, params, [batch])
    parts = [rows_of(batch, slice(0, 3)), rows_of(batch, slice(3, 4)), rows_of(batch, slice(4, 16))]
    np.testing.assert_allclose(evaluate(eval_step, params, parts)["loss"], whole["loss"], rtol=1e-6)
    mesh = make_mesh(data=4, fsdp=2)
    np.testing.assert_allclose(
        evaluate(eval_step, params, [batch], mesh=mesh)["loss"], whole["loss"], rtol=1e-6
    )
    loss, _ = problem.quiet(params, batch, None)
    np.testing.assert_allclose(whole["loss"], loss, rtol=1e-6)


def test_each_batch_draws_from_its_own_key(problem, key):
    params, batch = problem.make_params(), problem.make_batch(0)
    values = evaluate(make_eval_step(problem.objective), params, [batch, batch], key=key)
    draw = lambda number: problem.objective(params, batch, stream(key, "evaluation", number))[0]
    assert draw(0) != draw(1)
    np.testing.assert_allclose(values["loss"], (draw(0) + draw(1)) / 2, rtol=1e-6)


def test_metrics_that_are_no_means_count_like_the_loss():
    objective = lambda params, batch, key: (
        params * jnp.mean(batch),
        {"size": jnp.float32(batch.size)},
    )
    values = evaluate(make_eval_step(objective), 2.0, [jnp.ones(2), 4 * jnp.ones(6)])
    assert values == {"loss": (2.0 + 8.0) / 2, "size": 4.0}


def test_evaluation_adds_its_rows_and_is_done_at_the_end(problem, key):
    batches = [problem.make_batch(n) for n in range(5)]
    data = [problem.make_batch(100), problem.make_batch(101)]
    callback = evaluation(problem.quiet, data, steps=2)
    state, history = fit(
        problem.make_params(),
        problem.objective,
        optax.adam(1e-2),
        batches,
        steps=5,
        callbacks=[callback],
    )
    assert [row["step"] for row in history if "eval/loss" in row] == [2, 4, 5]
    expected = evaluate(make_eval_step(problem.quiet), state.params, data)
    assert history[-1]["eval/loss"] == expected["loss"]
    # Evaluation changes nothing.
    _, plain = fit(problem.make_params(), problem.objective, optax.adam(1e-2), batches, steps=5)
    assert [row["loss"] for row in plain] == [row["loss"] for row in history]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("saves", [None, 4, 9])
def test_without_steps_the_last_evaluation_is_where_the_batches_end(
    problem, steps, saves, tmp_path
):
    # With saves = 4 the last row is reported before it is known to be the last.
    calls, log = [], tmp_path / "metrics.jsonl"
    look = every(steps, lambda state: calls.append(int(state.step)) or {"eval/x": 0.5})
    _, history = fit(
        problem.make_params(),
        problem.objective,
        optax.sgd(0.1),
        [problem.make_batch(n) for n in range(4)],
        callbacks=[look, jsonl_log(log)],
        checkpoints=saves and Checkpoints(tmp_path / "checkpoints", every=saves),
    )
    wanted = [step for step in range(1, 5) if step % steps == 0 or step == 4]
    assert calls == wanted
    assert [row["step"] for row in history if "eval/x" in row] == wanted
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4]
    assert [row["step"] for row in lines if "eval/x" in row] == wanted


def test_batches_of_an_evaluation_must_start_anew(problem):
    with pytest.raises(ValueError, match="iterator, which is empty after"):
        evaluation(problem.quiet, iter([]))
    fresh = evaluation(problem.quiet, lambda: iter([problem.make_batch(0)]), steps=1)
    _, history = fit(
        problem.make_params(),
        problem.quiet,
        optax.sgd(0.0),
        [problem.make_batch(n) for n in range(2)],
        callbacks=[fresh],
    )
    assert history[0]["eval/loss"] == history[1]["eval/loss"]


def test_empty_evaluations_and_bad_intervals_are_refused(problem):
    with pytest.raises(ValueError, match="no batches"):
        evaluate(make_eval_step(problem.quiet), problem.make_params(), [])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        every(0, lambda state: {})
