import io
import json
import sys
import types

import numpy as np
import optax
import pytest
import rich.console

from jaxft.train import Callback, MissingDependencyError, Run, fit, jsonl_log, progress, wandb_log
from jaxft.train.logs import describe, tensorboard_log


def train(problem, callbacks, count=5, steps=None):
    batches = [problem.make_batch(n) for n in range(count)]
    return fit(
        problem.make_params(),
        problem.objective,
        optax.adam(1e-2),
        batches,
        steps=steps or count,
        callbacks=callbacks,
    )


def row(step, **values):
    return {"step": step, "loss": 2.0, "grad_norm": 1.0, "seconds": 0.5} | values


def test_jsonl_has_one_line_per_step_and_is_the_history(problem, tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    _, history = train(problem, [jsonl_log(path)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == history


def test_jsonl_goes_on_after_the_checkpoint_and_drops_what_came_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row(n)) + "\n" for n in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    log = jsonl_log(path)
    log.on_start(Run(3, 10, []))
    log.on_row(row(4, array=np.array([1.0, np.nan]), other=np.inf))
    log.on_end(None)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows[-1]["array"] == [1.0, None] and rows[-1]["other"] is None


def test_jsonl_keeps_its_rows_on_the_disk_while_a_run_begins(tmp_path):
    """A kill before the first new row must not take the old ones."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = jsonl_log(path)
    log.on_start(Run(2, 4, []))
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    log.on_row({"step": 3})
    assert path.read_text().splitlines()[2:] == ['{"step": 3}']
    log.on_end(None)


def test_off_a_terminal_progress_is_a_plain_line_every_few_steps(problem):
    out = io.StringIO()
    console = rich.console.Console(file=out)
    evaluated = Callback(on_step=lambda step, _: {"eval/loss": 1.5} if step == 5 else None)
    train(problem, [evaluated, progress(steps=3, console=console)], count=7)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/7", "3/7", "5/7", "6/7", "7/7"]
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert "eval/loss 1.5" in lines[2] and "tokens/s" in lines[-1] and "left 0:00:00" in lines[-1]


def test_on_a_terminal_progress_is_a_bar(problem):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=120)
    train(problem, [progress(console=console)])
    assert "\x1b[" in out.getvalue() and "━" in out.getvalue() and "step 5/5" in out.getvalue()


def test_progress_goes_to_standard_error(problem, capsys):
    train(problem, [progress()], count=2)
    captured = capsys.readouterr()
    assert captured.out == "" and "step 2/2" in captured.err


def test_rates_leave_out_the_compilation_of_the_first_step():
    recent = [row(1, seconds=100.0, num_tokens=10), *(row(n, num_tokens=10) for n in (2, 3))]
    line = describe(recent[-1], recent, 11)
    assert line == "step 3/11  loss 2  grad_norm 1  20 tokens/s  left 0:00:04"
    assert describe(row(1), [row(1)], None) == "step 1  loss 2  grad_norm 1"
    shown = describe(row(1) | {"reward": 0.5}, [row(1)], None, ("reward", "missing"))
    assert shown == "step 1  reward 0.5  0.5 s/step"


def fake_module(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb_gets_the_numbers(problem, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values["loss"])),
        finish=lambda exit_code: calls.append(exit_code),
    )
    fake_module(monkeypatch, "wandb", init=lambda **settings: calls.append(settings) or run)
    _, history = train(problem, [wandb_log("project", name="run", config={"rank": 4})], count=2)
    settings = dict(project="project", name="run", id="run", config={"rank": 4}, resume="allow")
    assert calls == [settings, *((r["step"], r["loss"]) for r in history), 0]


def test_tensorboard_gets_the_numbers(problem, monkeypatch, tmp_path):
    calls = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            calls.append((path, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    fake_module(monkeypatch, "tensorboardX", SummaryWriter=SummaryWriter)
    _, history = train(problem, [tensorboard_log(tmp_path)], count=2)
    assert calls[0] == (str(tmp_path), 1) and calls[-1] == "closed"
    assert ("loss", history[1]["loss"], 2) in calls and not any(c[0] == "step" for c in calls)


def test_tensorboard_files_can_be_read_back(problem, tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, history = train(problem, [tensorboard_log(tmp_path)])
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    read = [(e.step, e.value) for e in events.Scalars("loss")]
    np.testing.assert_allclose(read, [(r["step"], r["loss"]) for r in history], rtol=1e-6)


@pytest.mark.parametrize("make, name", [(wandb_log, "wandb"), (tensorboard_log, "tensorboardX")])
def test_a_missing_package_is_named_before_the_run(monkeypatch, make, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"needs {name}.* pip install {name}"):
        make("here")
