import numpy as np
import optax
import pytest

from jaxft.train import evaluation, fit, make_optimizer, plot_run, run_figure
from jaxft.train.figure import smooth


def lines_of(axis):
    return {line.get_label(): line.get_xydata() for line in axis.get_lines()}


def test_the_figure_shows_the_history(problem, tmp_path):
    path = tmp_path / "figures" / "run.png"
    batches = [problem.make_batch(n) for n in range(6)]
    callbacks = [
        evaluation(problem.quiet, [problem.make_batch(9)], steps=2),
        run_figure(path, title="A run"),
    ]
    optimizer = make_optimizer(1e-2, total_steps=6)
    _, history = fit(
        problem.make_params(), problem.objective, optimizer, batches, callbacks=callbacks
    )
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    figure = plot_run(history)
    losses, rate, norm = figure.axes
    series = lines_of(losses)
    np.testing.assert_allclose(series["train"], [(r["step"], r["loss"]) for r in history])
    np.testing.assert_allclose(
        series["eval"], [(r["step"], r["eval/loss"]) for r in history if "eval/loss" in r]
    )
    assert (rate.get_ylabel(), norm.get_ylabel()) == ("learning rate", "grad norm")
    assert norm.get_xlabel() == "step"


def test_it_is_drawn_when_the_run_fails_and_of_what_there_is(problem, tmp_path):
    def fail(row):
        if row["step"] == 2:
            raise RuntimeError("stop")

    path = tmp_path / "run.png"
    batches = [problem.make_batch(n) for n in range(3)]
    with pytest.raises(RuntimeError):
        fit(
            problem.make_params(),
            problem.objective,
            optax.sgd(0.1),
            batches,
            callbacks=[run_figure(path), fail],
        )
    assert path.exists()
    assert len(plot_run([{"step": 1, "loss": 1.0}]).axes) == 1


def test_other_metrics_may_take_the_places_of_the_loss():
    rows = [{"step": n, "loss": 1.0, "reward": float(n), "length": 2.0} for n in (1, 2)]
    reward, length = plot_run(rows, main="reward", below=("length", "missing")).axes
    np.testing.assert_allclose(lines_of(reward)["train"], [(1, 1), (2, 2)])
    assert (reward.get_ylabel(), length.get_ylabel()) == ("reward", "length")


def test_long_runs_are_smoothed():
    history = [{"step": n + 1, "loss": float(n % 2)} for n in range(200)]
    series = lines_of(plot_run(history).axes[0])
    np.testing.assert_allclose(series["train, mean of 4 steps"][3:, 1], 0.5)


@pytest.mark.parametrize("window", [1, 3, 10])
def test_smooth_is_the_mean_of_the_last_values(window):
    values = np.random.default_rng(0).normal(size=7)
    expected = [values[max(0, i + 1 - window) : i + 1].mean() for i in range(7)]
    np.testing.assert_allclose(smooth(values, window), expected)
