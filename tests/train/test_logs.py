import io
import json
import sys
import types

import numpy as np
import optax
import pytest
import rich.console

from experiments.cli import flags
from jaxft.train import (
    Callback,
    MissingDependencyError,
    Run,
    fit,
    jsonl_log,
    progress,
    run_main,
    tensorboard_log,
    trackio_log,
    wandb_log,
)
from jaxft.train.logs import describe


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
    assert lines.pop(0) == "compiling the first step ..."
    assert [line.split()[1] for line in lines] == ["1/7", "3/7", "5/7", "6/7", "7/7"]
    assert "left" not in lines[0]  # nothing but the compilation was timed
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert "eval/loss 1.5" in lines[2] and "tokens/s" in lines[-1] and "left 0:00:00" in lines[-1]


def test_on_a_terminal_progress_is_a_bar(problem):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=120)
    train(problem, [progress(console=console)])
    assert "\x1b[" in out.getvalue() and "━" in out.getvalue() and "step 5/5" in out.getvalue()


def test_on_a_terminal_evaluations_stay_and_a_redirected_output_gets_its_lines(capsys):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=46, color_system=None)
    shown = progress(console=console)
    shown.on_start(Run(0, 2, []))
    print("for the file")  # standard output is not one, so this must not go to the terminal
    shown.on_row(row(1, **COUNTS) | {"eval/loss": 1.5})
    shown.on_row(row(2, **COUNTS))
    shown.on_end(None)
    assert capsys.readouterr().out == "for the file\n" and "for the file" not in out.getvalue()
    lines = out.getvalue().split("\n")
    assert [line.split("\x1b[2K")[-1].strip() for line in lines] == [
        "step 1/2  loss 2  eval/loss 1.5  grad_norm 1",  # in full
        "━" * 15 + " step 2/2  loss 2  left 0:00:00",  # the bar keeps its width
        "\x1b[?25h",
    ]


def test_progress_goes_to_standard_error(problem, capsys):
    train(problem, [progress()], count=2)
    captured = capsys.readouterr()
    assert captured.out == "" and "step 2/2" in captured.err


COUNTS = dict(num_tokens=10, num_input_tokens=40)
SLOW = row(3, seconds=100.0, **COUNTS)  # compiles again, or evaluates
RECENT = [row(2, **COUNTS), SLOW, row(4, **COUNTS)]


@pytest.mark.parametrize(
    "recent, steps, how, wanted",
    [
        (RECENT, 12, {}, "step 4/12  loss 2  grad_norm 1  80 tokens/s (20 trained)  left 0:00:04"),
        (
            [row(4, num_tokens=10)],
            4,
            {},
            "step 4/4  loss 2  grad_norm 1  20 tokens/s  left 0:00:00",
        ),
        ([], 12, {}, "step 4/12  loss 2  grad_norm 1"),
        (RECENT, 12, {"width": 57}, "step 4/12  loss 2  80 tokens/s (20 trained)  left 0:00:04"),
        (
            RECENT,
            12,
            {"extra": {"eval/a": 3, "eval/num_tokens": 9, "eval/b/accuracy": 1, "eval/loss": 2}}
            | {"width": 98},
            "step 4/12  loss 2  eval/loss 2  eval/b/accuracy 1  80 tokens/s (20 trained)  left 0:00:04",
        ),
        (RECENT, 12, {"width": 48}, "step 4/12  loss 2  80 tokens/s  left 0:00:04"),
        (RECENT, 12, {"width": 40}, "step 4/12  loss 2  left 0:00:04"),
        (RECENT, None, {"width": 1}, "step 4  loss 2"),
        (RECENT, None, {"show": ("reward", "missing")}, "step 4  reward 0.5  0.5 s/step"),
    ],
)
def test_a_line_has_rates_of_all_tokens_and_of_those_trained_from_medians(
    recent, steps, how, wanted
):
    line = row(4) | {"reward": 0.5} | how.get("extra", {})
    how = {name: x for name, x in how.items() if name != "extra"}
    assert describe(line, recent, steps, **how) == wanted


def test_the_first_step_of_a_resumed_run_is_not_timed_and_a_repeated_row_once():
    out = io.StringIO()
    shown = progress(steps=1, console=rich.console.Console(file=out))
    shown.on_start(Run(6, 9, []))
    for at, seconds in ((7, 100.0), (8, 1.0), (8, 1.0), (9, 3.0)):
        shown.on_row(row(at, seconds=seconds, num_tokens=6))
    shown.on_end(None)
    assert [line.split("  ")[-1] for line in out.getvalue().splitlines()[1:]] == [
        "grad_norm 1",
        *["left 0:00:01"] * 2,
        "left 0:00:00",
    ]
    assert "4 tokens/s" in out.getvalue().splitlines()[-1]  # the median of 6 and 2


def test_in_a_notebook_progress_is_one_line_that_is_rewritten():
    out = io.StringIO()
    shown = progress(console=rich.console.Console(file=out, force_jupyter=True, width=80))
    shown.on_start(Run(0, 3, []))
    for at in (1, 2, 3):
        shown.on_row(row(at, num_tokens=6))
    shown.on_end(None)
    text = out.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and "\x1b" not in text
    assert [line.split()[0] for line in text.split("\r")[1:]] == ["compiling", *["step"] * 3]
    assert len(text.split("\r")[2]) >= len(text.split("\r")[1])  # covers what was there


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


def test_trackio_gets_the_numbers(monkeypatch, tmp_path):
    """Follows the flag of the scripts: project, name of the run and flags."""
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)))
    init = lambda **settings: calls.append(settings) or run
    fake_module(monkeypatch, "trackio", init=init, finish=lambda: calls.append("finished"))
    log = flags.LOGS["trackio"](flags.Output("runs/one"), tmp_path / "one")
    log.on_start(Run(0, 1, []))
    log.on_row(row(1, array=np.ones(2)))
    log.on_end(None)
    settings = dict(project="jaxft", name="one", resume="allow")
    assert calls[0] == settings | {"config": flags.flat(flags.Output("runs/one"))}
    assert calls[1:] == [(1, {"loss": 2.0, "grad_norm": 1.0, "seconds": 0.5}), "finished"]


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


@pytest.mark.parametrize(
    "make, name",
    [(wandb_log, "wandb"), (tensorboard_log, "tensorboardX"), (trackio_log, "trackio")],
)
def test_a_missing_package_and_its_extra_are_named_before_the_run(monkeypatch, capsys, make, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"needs {name}.* pip install {name}"):
        make("here")
    with pytest.raises(SystemExit) as ended:
        run_main(make, "here")
    assert ended.value.code == 3 and "'jaxft[logging]'" in capsys.readouterr().err
