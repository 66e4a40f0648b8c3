"""Metrics from device to host, one step late."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxft.metrics import Mean, Terms
from jaxft.train.callbacks import Callback, Row
from jaxft.train.errors import DivergedError

OWN = ("step", "seconds")  # entries of a row that are not metrics


class Rows:
    """The history of a run: `push` takes the metrics of a step and reports the previous step's row.

    Copies to the host start at once and are awaited only after the next step is dispatched, so
    the device always has work.
    """

    def __init__(self, callbacks: Iterable[Callback], history: Iterable[Row] = ()):
        self.history = list(history)
        self._callbacks = [c.on_row for c in callbacks if c.on_row]
        self._pending, self._names = None, frozenset()
        self._time = time.perf_counter()

    def push(self, step: int, metrics: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Takes the metrics of a step that has just been dispatched; reports the previous step.

        Raises:
            ValueError: if a metric has the name of another entry of the row.
        """
        refuse_names(metrics, OWN, "fit: the step")
        self._names = metrics.keys()
        refuse_names(extra, (*OWN, *self._names), "fit: a callback")
        # Means are divided on the host: no small program for the devices after each step.
        jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
        # Dispatching on a CPU may wait for the step: then it has ended now, not when it is reported.
        ended = time.perf_counter() if _are_ready(metrics) else None
        before, self._pending = self._pending, (step, metrics, dict(extra), ended)
        self._report(before)

    def amend(self, extra: Mapping[str, Any]) -> None:
        """Adds metrics to the row of the last step; a row that was already reported is reported again.

        Raises: see `push`.
        """
        refuse_names(extra, (*OWN, *self._names), "fit: a callback")
        if self._pending is not None:
            self._pending[2].update(extra)
        elif extra:
            self.history[-1] = self.history[-1] | dict(extra)
            self._tell(self.history[-1])

    def flush(self) -> None:
        """Reports the last step, waiting for it."""
        before, self._pending = self._pending, None
        self._report(before)

    def _report(self, pending):
        if pending is None:
            return
        step, values, extra, ended = pending
        values = {name: _number(value) for name, value in values.items()}
        if not values.pop("good"):
            self._pending = None
            raise DivergedError(_diverged_message(step, values), step)
        ended = time.perf_counter() if ended is None else ended
        row = {"step": step} | values | extra | {"seconds": ended - self._time}
        self._time = ended
        self.history.append(row)
        self._tell(row)

    def _tell(self, row):
        for on_row in self._callbacks:
            on_row(row)


def _are_ready(metrics):
    return all(leaf.is_ready() for leaf in jax.tree.leaves(metrics) if isinstance(leaf, jax.Array))


def refuse_names(metrics: Mapping[str, Any], taken: Iterable[str], who: str) -> None:
    """Raises ValueError if metrics from `who` have names that the row of a step already has."""
    if found := [name for name in metrics if name in taken]:
        raise ValueError(
            f"{who} gives a metric {found[0]!r}, a name that the row of a step already has; rename it."
        )


def _number(value):
    if isinstance(value, Terms):
        return sum(map(_number, value.parts))
    if isinstance(value, Mean):
        total, weight = np.asarray(value.total), np.asarray(value.weight, np.float32)
        # A total may be a count, whose quotient is not an integer; float32 keeps its dtype.
        quotient = np.zeros(total.shape, np.result_type(total, weight))
        value = np.divide(total, weight, out=quotient, where=weight != 0)
    value = np.asarray(value)
    return value.item() if value.ndim == 0 else value


def _diverged_message(step, values):
    numbers = {n: v for n, v in values.items() if isinstance(v, (int, float))}
    usual = [n for n in ("loss", "grad_norm") if n in numbers]
    bad = lambda names: [n for n in names if not math.isfinite(numbers[n])]
    # A step of make_step stops only for its loss or gradient, a user's step for any metric.
    bad = bad(usual) or bad(numbers) or ["loss"]
    shown = ", ".join(f"{name} = {numbers.get(name)}" for name in usual or bad)
    return (
        f"diverged at step {step}: {' and '.join(bad)} not finite ({shown}); the state before it is "
        "kept. Lower the learning rate, or look for bad numbers in the batch."
    )
