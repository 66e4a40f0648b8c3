"""Plots of means over seeds, always with the interval of `claims.interval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.lab.claims import interval


def plot_mean(
    axes: Any,
    runs: list[dict],
    name: str,
    value: Callable[[dict], Any],
    *style: str,
    x: str = "step",
    **more: Any,
) -> None:
    """Plots the mean over seeds of `value` against `x`, from the rows runs[i][name], with its band."""
    values = [[value(row) for row in run[name]] for run in runs]
    plot_band(axes, [row[x] for row in runs[0][name]], values, *style, **more)


def plot_band(axes: Any, x: Sequence[float], values: Any, *style: str, **more: Any) -> None:
    """Plots the mean over seeds of `values` [seeds, len(x)] as a line with its interval as a band."""
    means, low, high = intervals(values)
    (line,) = axes.plot(x, means, *style, **more)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def bar_means(axes: Any, names: Sequence[str], values: Any) -> None:
    """Plots a horizontal bar for each name: the mean over seeds of `values` [seeds, len(names)].

    The interval is a line with caps; each dot is one seed.
    """
    means, low, high = intervals(values)
    error = np.stack([means - low, high - means])
    axes.barh(names, means, xerr=error, color="#4477aa", ecolor="#bb5566", capsize=3)
    axes.plot(np.transpose(values), np.arange(len(names)), "k.", markersize=4)


def intervals(values: Any) -> np.ndarray:
    """(means, low, high) [3, N] over seeds of `values` [seeds, N]; NaN low and high for one seed."""
    return np.array([interval(column) for column in np.transpose(values)]).T
