"""Loggers for the rows of a run: the terminal, a file, TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress

from jaxft.output import writable_directory, writing
from jaxft.train.callbacks import Callback, on_main_process
from jaxft.train.errors import require


def progress(
    *,
    steps: int = 10,
    show: Sequence[str] = (),
    console: rich.console.Console | None = None,
) -> Callback:
    """Shows a progress bar with loss, tokens/s and time left; without a terminal, prints lines.

    Writes to standard error or to `console`; in a notebook, rewrites one line of standard output. Says
    "compiling" until the metrics of the first step arrive; rows with an evaluation stay above the bar. See
    `describe` for the rates.

    Args:
        steps: steps between lines; rates are medians of the same number of recent steps, at least 10.
        show: metrics to show instead of loss, gradient norm and learning rate, such as ("reward", "length"),
            with seconds per step instead of tokens/s.
    """
    if steps < 1:
        raise ValueError(f"progress: steps must be at least 1, got {steps}.")
    console = console or _usual_console()
    meter = {}

    def on_start(run):
        write, close = _writer(console, run)
        meter.update(run=run, recent=[], write=write, close=close)
        write("compiling the first step ...", run.first_step, True, None)

    def on_row(row):
        run, recent = meter["run"], meter["recent"]
        first = row["step"] == run.first_step + 1
        recent[:] = [r for r in recent if r["step"] != row["step"]]  # a row may come twice
        if not first:  # The seconds of the first step include compilation.
            recent[:] = [*recent, row][-max(steps, 10) :]
        evaluated = any(name.startswith("eval") for name in row)
        due = evaluated or first or row["step"] == run.steps or row["step"] % steps == 0
        width = _room(console) if console.is_terminal or console.is_jupyter else _LINE
        line = functools.partial(describe, row, recent, run.steps, show)
        meter["write"](line(width), row["step"], due, line(_LINE) if evaluated else None)

    def on_end(error):
        del error
        if close := meter.pop("close", None):
            close()

    return on_main_process(Callback(on_start=on_start, on_row=on_row, on_end=on_end))


_BAR = 16  # columns of the bar, with the space after it
_LINE = 160  # columns of a line that stays; an evaluation of preferences has a dozen metrics


def _usual_console():
    console = rich.console.Console(stderr=True)
    # Notebooks show standard error as a fault.
    return rich.console.Console() if console.is_jupyter else console


def _room(console):
    return console.width - (0 if console.is_jupyter else _BAR)


def _writer(console, run):
    """(write(text, step, due, kept), close()) for a notebook, a terminal or neither."""
    if console.is_jupyter:  # rich's own bar needs ipywidgets, and warns where they are absent
        put = lambda text: (console.file.write(text), console.file.flush())
        seen = [0]

        def write(text, step, due, kept):
            del step, due, kept
            put("\r" + text.ljust(seen[0]))
            seen[0] = len(text)

        return write, lambda: put("\n")
    show = lambda text: console.print(text, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        return (lambda text, step, due, kept: show(text) if due else None), lambda: None
    # A bar repaints its line, so what others print meanwhile must pass through it, unless standard output
    # is a file or a pipe, which must get its own lines.
    bar = rich.progress.Progress(
        rich.progress.BarColumn(bar_width=_BAR - 1),
        "{task.fields[shown]}",
        console=console,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),
    )
    task = bar.add_task("", total=None, completed=run.first_step, shown="")  # moves, as no step has
    bar.start()

    def write(text, step, due, kept):
        del due
        if kept:
            show(kept)
        bar.update(
            task, completed=step, shown=text, total=run.steps if step > run.first_step else None
        )

    return write, bar.stop


def describe(
    row: Mapping[str, Any],
    recent: Sequence[Mapping[str, Any]],
    steps: int | None,
    show: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """Formats a row as a line: step, metrics (of an evaluation, loss and accuracy first), rates, time left.

    Tokens/s counts `num_input_tokens`, the tokens that the model reads in a step. The rate of `num_tokens`,
    the tokens in the loss, follows in brackets if it is lower. Rates and time left are medians over the
    recent rows: a single step that compiles, evaluates or saves does not change them.

    Args:
        recent: rows with representative seconds; empty: no rates and no time left.
        steps: number of steps at which the run ends, if known.
        show: see `progress`.
        width: available columns; the last metrics are left out until the line fits, then the rates, then
            the time left. None: no limit.
    """
    first = f"step {row['step']}" + (f"/{steps}" if steps else "")
    evaluated = [n for n in row if n.startswith("eval") and not n.endswith("_tokens")]
    evaluated.sort(key=lambda n: (not n.endswith("loss"), not n.endswith("accuracy")))
    names = [*show, *evaluated] if show else ["loss", *evaluated, "grad_norm", "learning_rate"]
    metrics = [f"{name} {row[name]:.4g}" for name in names if np.ndim(row.get(name, [])) == 0]
    rates, left = _rates(recent, per_step=bool(show)), []
    if steps and recent:
        seconds = (steps - row["step"]) * statistics.median(r["seconds"] for r in recent)
        left = [f"left {datetime.timedelta(seconds=round(seconds))}"]
    line = lambda: "  ".join(filter(None, [first, *metrics, " ".join(rates), *left]))
    while width is not None and len(line()) > width and (len(metrics) > 1 or rates or left):
        (metrics if len(metrics) > 1 else rates or left).pop()
    return line()


def _rates(recent, per_step):
    if not recent:
        return []
    if per_step:
        return [f"{statistics.median(r['seconds'] for r in recent):.3g} s/step"]
    timed = [r for r in recent if r["seconds"] > 0 and "num_tokens" in r]
    if not timed:
        return []
    rate = lambda count: statistics.median(count(r) / r["seconds"] for r in timed)
    trained = rate(lambda r: r["num_tokens"])
    processed = rate(lambda r: r.get("num_input_tokens", r["num_tokens"]))
    beside = [f"({trained:,.0f} trained)"] if trained < processed else []
    return [f"{processed:,.0f} tokens/s", *beside]


def jsonl_log(path: str | Path) -> Callback:
    """Writes each row as a line of JSON; numbers that are not finite are null.

    A resumed run continues the same file and removes the rows after the checkpoint, so each step
    appears once.
    """
    path, files, newest = Path(path), [], {}

    def on_start(run):
        newest.clear()
        writable_directory(path.parent)
        kept = _lines_up_to(path, run.first_step)
        # Replace the file atomically: a kill between truncating and writing it would lose the rows.
        new = path.with_name(path.name + ".tmp")
        with writing(path):
            new.write_text("".join(kept))
            os.replace(new, path)
            files.append(path.open("a"))

    def on_row(row):
        if row["step"] in newest:  # reported again with more metrics: replace its line
            files[0].truncate(newest[row["step"]])
        else:
            newest.clear(), newest.update({row["step"]: files[0].tell()})
        with writing(path):
            files[0].write(json.dumps({k: _as_json(v) for k, v in row.items()}) + "\n")
            files[0].flush()

    def on_end(error):
        del error
        with writing(path):  # retry lines that could not be written before
            while files:
                files.pop().close()

    return on_main_process(Callback(on_start=on_start, on_row=on_row, on_end=on_end))


def tensorboard_log(directory: str | Path) -> Callback:
    """Logs each number of the rows as a TensorBoard scalar; needs the package tensorboardX."""
    tensorboard = require("tensorboardX", "tensorboard_log", "logging")
    writers = []

    def on_start(run):
        path = str(writable_directory(directory))
        writers.append(tensorboard.SummaryWriter(path, purge_step=run.first_step + 1))

    def on_row(row):
        with writing(directory):
            for name, value in _numbers(row).items():
                writers[0].add_scalar(name, value, row["step"])

    def on_end(error):
        del error
        with writing(directory):
            while writers:
                writers.pop().close()

    return on_main_process(Callback(on_start=on_start, on_row=on_row, on_end=on_end))


def wandb_log(
    project: str, *, name: str | None = None, config: Mapping[str, Any] | None = None
) -> Callback:
    """Logs each number of the rows to Weights & Biases; needs the package wandb.

    WANDB_MODE=offline keeps the log on this machine. A resumed run continues the run of the same name.
    """
    wandb = require("wandb", "wandb_log", "logging")
    runs = []

    def on_start(run):
        del run
        settings = dict(project=project, name=name, id=name, config=dict(config or {}))
        runs.append(wandb.init(**settings, resume="allow"))

    def on_end(error):
        while runs:
            runs.pop().finish(exit_code=0 if error is None else 1)

    return on_main_process(
        Callback(
            on_start=on_start,
            on_row=lambda row: runs[0].log(_numbers(row), step=row["step"]),
            on_end=on_end,
        )
    )


def trackio_log(
    project: str, *, name: str | None = None, config: Mapping[str, Any] | None = None
) -> Callback:
    """Each number of the rows to trackio; needs the package trackio.

    It keeps them on this machine (`trackio show`) unless TRACKIO_SPACE_ID names a Space of the hub. A resumed
    run continues the run of the same name.
    """
    trackio = require("trackio", "trackio_log", "logging")
    runs = []

    def on_start(run):
        del run
        settings = dict(project=project, name=name, config=dict(config or {}))
        runs.append(trackio.init(**settings, resume="allow"))

    def on_end(error):
        del error
        while runs:
            runs.pop()
            trackio.finish()  # of the module: it also ends the current run of `trackio.log`

    return on_main_process(
        Callback(
            on_start=on_start,
            on_row=lambda row: runs[0].log(_numbers(row), step=row["step"]),
            on_end=on_end,
        )
    )


def _numbers(row):
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, (bool, int, float))}


def _as_json(value):
    if isinstance(value, np.ndarray):
        return [_as_json(v) for v in value.tolist()]
    if isinstance(value, list):
        return [_as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_up_to(path, step):
    """Returns the lines of a log up to a step; after a kill, the last line may be truncated."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
