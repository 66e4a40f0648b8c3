"""Callbacks of a run: loggers, evaluation, profiling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxft.train.state import TrainState

Row = dict[str, Any]  # the metrics of one step as numbers: {"step": 1, "loss": 2.5, ...}


class Run(NamedTuple):
    """Facts about the run that `on_start` receives."""

    first_step: int  # steps already done: 0, or the checkpoint's step
    steps: int | None  # the step at which the run ends, if known
    history: list[Row]  # rows restored from a checkpoint


class Callback(NamedTuple):
    """Functions that a run calls; each is optional. A plain function is used as `on_row`.

    on_start(run): before the first step.
    on_step(step, state) -> more metrics or None: after each step is dispatched and before the
        next. Do not keep `state`: the next step overwrites it. Metrics named "step", "seconds" or like one
        of the step's own metrics raise ValueError.
    on_row(row): with the metrics of each step in turn, one step late, so that the device never waits. If
        on_last adds metrics to a row that was already reported, because its step was saved, the extended
        row is reported again.
    on_last(step, state) -> more metrics or None: when the batches have run out, after the last step.
    on_end(error): at the end, with the exception that ended the run or None.
    """

    on_start: Callable[[Run], None] | None = None
    on_step: Callable[[int, TrainState], Mapping[str, Any] | None] | None = None
    on_row: Callable[[Row], None] | None = None
    on_end: Callable[[BaseException | None], None] | None = None
    on_last: Callable[[int, TrainState], Mapping[str, Any] | None] | None = None


def as_callbacks(callbacks: Iterable[Callback | Callable[[Row], None]]) -> list[Callback]:
    """Converts plain functions among the callbacks to Callbacks."""
    return [c if isinstance(c, Callback) else Callback(on_row=c) for c in callbacks]


def every(steps: int, function: Callable[[TrainState], Mapping[str, Any]]) -> Callback:
    """Merges function(state) into the rows of every `steps`-th step and of the last, as evaluation does.

    The last step is the run's `steps`, or the one after which the batches run out.
    """
    if steps < 1:
        raise ValueError(f"every: steps must be at least 1, got {steps}.")
    last, done = [], []

    def measure(step, state):
        done[:] = [step]
        return function(state)

    due = lambda step: step % steps == 0 or step in last
    return Callback(
        on_start=lambda run: (last.append(run.steps), done.clear()),
        on_step=lambda step, state: measure(step, state) if due(step) else None,
        on_last=lambda step, state: None if step in done else measure(step, state),
    )


def at_steps(
    steps: Sequence[int], function: Callable[[TrainState], Mapping[str, Any] | None]
) -> Callback:
    """Merges function(state) into the rows of the given steps, such as `log_spaced(total)`.

    For measurements that are dense where a run changes fast. If the batches run out earlier, the last step is
    measured too. Step 0 has no row: measure the params before the run.

    Raises:
        ValueError: for steps that do not increase from 1 on or, at the start of a run, exceed its last one.
    """
    steps = tuple(steps)
    if not steps or any(b <= a for a, b in itertools.pairwise((0, *steps))):
        raise ValueError(
            f"at_steps: steps must increase from 1 on without duplicates, got {list(steps)}; sort them, and "
            "measure step 0 before the run."
        )

    def check(run):
        if run.steps is not None and steps[-1] > run.steps:
            raise ValueError(
                f"at_steps: step {steps[-1]} is after the run's last step {run.steps}; lower it."
            )

    due = frozenset(steps)
    return Callback(
        on_start=check,
        on_step=lambda step, state: function(state) if step in due else None,
        on_last=lambda step, state: None if step in due else function(state),
    )


def log_spaced(total: int, share: float = 0.05) -> tuple[int, ...]:
    """Steps 1, 2, 4, ... up to `share` of the total, then every `share` of it, and the total itself."""
    if total < 1 or not 0 < share <= 1:
        raise ValueError(
            f"log_spaced: needs total >= 1 and 0 < share <= 1, got {total} and {share}."
        )
    gap = max(1, round(share * total))
    doubled = itertools.takewhile(lambda step: step < gap, (2**i for i in itertools.count()))
    return tuple(sorted({*doubled, *range(gap, total, gap), total}))


def profile(directory: str | Path, *, start: int = 3, stop: int = 6) -> Callback:
    """Writes a jax.profiler trace of steps start + 1 to `stop`, for xprof or Perfetto."""
    if not 0 <= start < stop:
        raise ValueError(f"profile: needs 0 <= start < stop, got {start} and {stop}.")
    running = []

    def on_step(step, state):
        if running and step >= stop:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            running.clear()
        elif not running and start <= step < stop:
            jax.block_until_ready(state)  # The trace begins after earlier steps have ended.
            jax.profiler.start_trace(str(directory))
            running.append(True)

    def on_end(error):
        del error
        if running:
            jax.profiler.stop_trace()

    return Callback(on_step=on_step, on_end=on_end)


def on_main_process(callback: Callback) -> Callback:
    """Runs the callback on process 0 only, for callbacks that write files or to a terminal."""

    def only(function):
        if function is None:
            return None
        return lambda *args: function(*args) if jax.process_index() == 0 else None

    return Callback(*map(only, callback))
