"""Figure of a run: loss, learning rate, gradient norm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.output import writable_directory, writing
from jaxft.train.callbacks import Callback, Row, on_main_process
from jaxft.train.errors import require

TRAIN, EVAL, GRID = "#4C72B0", "#DD8452", "#DDDDDD"


BELOW = ("learning_rate", "grad_norm")


def run_figure(
    path: str | Path, *, title: str = "", main: str = "loss", below: Sequence[str] = BELOW
) -> Callback:
    """Writes `plot_run` of all rows to a PNG (or PDF, SVG) when the run ends, also after an error."""
    require("matplotlib", "run_figure", "text")
    path, rows = Path(path), {}  # by step: a row that is reported again replaces the earlier one

    def on_start(run):
        writable_directory(path.parent)
        rows.update({row["step"]: row for row in run.history})

    def on_end(error):
        del error
        if rows:
            figure = plot_run(list(rows.values()), title=title, main=main, below=below)
            # Write a temporary file first: if the disk is full, the earlier figure remains.
            new = path.with_name(f".{path.name}.tmp{path.suffix}")
            with writing(path):
                try:
                    figure.savefig(new, dpi=150)
                    os.replace(new, path)
                finally:
                    new.unlink(missing_ok=True)

    on_row = lambda row: rows.update({row["step"]: row})
    return on_main_process(Callback(on_start=on_start, on_row=on_row, on_end=on_end))


def plot_run(
    history: Sequence[Row],
    *,
    title: str = "",
    main: str = "loss",
    below: Sequence[str] = BELOW,
) -> Any:
    """Returns a matplotlib Figure: losses (train and eval) above learning rate and gradient norm.

    `main` and `below` name other metrics to plot instead: ("reward", ("length", "entropy")).
    """
    # Without pyplot, which keeps figures in a global list and selects a display.
    figure_module = require("matplotlib.figure", "plot_run", "text")
    names = [n for n in below if any(n in row for row in history)]
    figure = figure_module.Figure(figsize=(7, 4 + 1.4 * len(names)), layout="constrained")
    heights = [3] + [1] * len(names)
    axes = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    _plot_main(axes[0], history, main)
    for axis, name in zip(axes[1:], names, strict=True):
        axis.plot(*_series(history, name), color=TRAIN, linewidth=1)
        axis.set_ylabel(name.replace("_", " "))
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    figure.suptitle(title)
    figure.align_ylabels()
    return figure


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Trailing means of the last `window` values (fewer at the start)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _plot_main(axis, history, main):
    steps, values = _series(history, main)
    window = max(1, len(values) // 50)
    if window > 1:
        axis.plot(steps, values, color=TRAIN, linewidth=0.8, alpha=0.3)
    label = "train" if window == 1 else f"train, mean of {window} steps"
    axis.plot(steps, smooth(values, window), color=TRAIN, linewidth=1.6, label=label)
    evaluated = [n for n in {k: None for row in history for k in row} if n.endswith(f"/{main}")]
    for name in evaluated:
        color = EVAL if len(evaluated) == 1 else None
        label = name.removesuffix(f"/{main}")
        axis.plot(*_series(history, name), color=color, marker="o", markersize=4, label=label)
    axis.set_ylabel(main)
    axis.legend(frameon=False)


def _series(history, name):
    rows = [row for row in history if name in row]
    return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows], float)
