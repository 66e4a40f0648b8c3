"""Loggers for the rows of a run: the terminal, a file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import datetime
import json
import math
import os
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

    Writes to standard error or to `console`; lines come every `steps` steps. Tokens are those that the loss
    counts. `show` names metrics to show instead, such as ("reward", "length"), with seconds per step.
    """
    if steps < 1:
        raise ValueError(f"progress: steps must be at least 1, got {steps}.")
    console = console or rich.console.Console(stderr=True)
    meter = {}

    def on_start(run):
        meter.update(run=run, since=[], bar=None)
        if console.is_terminal:
            columns = [
                "{task.description}",
                rich.progress.BarColumn(bar_width=30),
                "{task.fields[shown]}",
            ]
            meter["bar"] = rich.progress.Progress(*columns, console=console, transient=False)
            meter["task"] = meter["bar"].add_task(
                "train", total=run.steps, completed=run.first_step, shown=""
            )
            meter["bar"].start()

    def on_row(row):
        meter["since"] = [*meter["since"], row][-max(steps, 2) :]
        shown = describe(row, meter["since"], meter["run"].steps, show)
        evaluated = any(name.startswith("eval") for name in row)
        if meter["bar"]:
            meter["bar"].update(meter["task"], completed=row["step"], shown=shown)
        elif (
            evaluated
            or row["step"] in (meter["run"].first_step + 1, meter["run"].steps)
            or (row["step"] % steps == 0)
        ):
            console.print(shown, highlight=False, soft_wrap=True)

    def on_end(error):
        del error
        if meter.get("bar"):
            meter["bar"].stop()

    return on_main_process(Callback(on_start=on_start, on_row=on_row, on_end=on_end))


def describe(
    row: Mapping[str, Any],
    recent: list[Mapping[str, Any]],
    steps: int | None,
    show: Sequence[str] = (),
) -> str:
    """Formats a row as a line: step, metrics, then tokens/s and time left from the recent rows."""
    parts = [f"step {row['step']}" + (f"/{steps}" if steps else "")]
    evaluated = (name for name in row if name.startswith("eval"))
    first = [*show, *evaluated] if show else ["loss", *evaluated, "grad_norm", "learning_rate"]
    parts += [f"{name} {row[name]:.4g}" for name in first if np.ndim(row.get(name, [])) == 0]
    # The very first row includes compilation.
    timed = recent[1:] or recent
    seconds = sum(r["seconds"] for r in timed)
    if show:
        parts.append(f"{seconds / len(timed):.3g} s/step")
    elif seconds > 0 and "num_tokens" in row:
        parts.append(f"{sum(r['num_tokens'] for r in timed) / seconds:,.0f} tokens/s")
    if steps:
        left = (steps - row["step"]) * seconds / len(timed)
        parts.append(f"left {datetime.timedelta(seconds=round(left))}")
    return "  ".join(parts)


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
    tensorboard = require("tensorboardX", "tensorboard_log")
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
    wandb = require("wandb", "wandb_log")
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
