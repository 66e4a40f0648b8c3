"""Saving and resuming a run with Orbax: trainable params, optimizer, key, data position."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxft.adapters import combine, partition
from jaxft.output import OutputError, check_room, free, reason, size_text, writable_directory
from jaxft.parallel import gathered, meet
from jaxft.train.batches import BatchSource
from jaxft.train.callbacks import Row
from jaxft.train.digest import all_finite, digests
from jaxft.train.errors import DivergedError
from jaxft.train.packing import packed
from jaxft.train.state import TrainState
from jaxft.train.stored import (
    FORMAT,
    NOTHING,
    MismatchError,
    amend,
    check_same,
    filled,
    json_checksum,
    open_manager,
    own_position,
    quiet_absl,
    read_arrays,
    read_meta,
    restored_state,
)

HISTORY_ROWS = 1000  # saved with a checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The place and times at which `fit` saves, and whether it resumes.

    A checkpoint holds the trainable part of the params, the optimizer's state, the carry, the key, the data
    position and the last rows of the history. Of the frozen part it holds only shapes and checksums,
    which must be the same on resume. It is written in the background and appears under its number only
    when complete. The final state is always saved.
    """

    directory: str | Path
    every: int = 500  # steps between saves
    last: int = 3  # newest checkpoints kept
    best: str | None = None  # name of a metric such as "eval/loss": each step that reports it is
    # saved, and the best one is kept in addition to the newest; None: none is
    mode: Literal["min", "max"] = "min"  # which value of `best` is the best
    resume: bool = False  # continue from the newest checkpoint, if there is one
    # the run's settings, as JSON; saved for `saved_settings`, and not compared here
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.every < 1 or self.last < 1:
            raise ValueError(
                f"Checkpoints: every and last must be at least 1, got {self.every} and {self.last}."
            )
        if self.mode not in ("min", "max"):
            raise ValueError(f"Checkpoints: mode must be 'min' or 'max', got {self.mode!r}.")


@contextlib.contextmanager
def open_checkpoints(checkpoints: Checkpoints | None, state: TrainState) -> Iterator[Saver]:
    """Yields the Saver of a run that begins at `state`.

    Raises:
        OutputError: if the directory is not writable or has no room for one checkpoint.
    """
    if checkpoints is None:
        yield Saver(None, None, {}, 0)
        return
    trainable, frozen = partition(state.params)
    size = sum(x.nbytes for x in jax.tree.leaves((trainable, state.opt_state, state.carry)))
    directory = writable_directory(checkpoints.directory, size)
    with quiet_absl():
        manager = open_manager(directory, checkpoints.last, checkpoints.best is not None)
        saver = Saver(checkpoints, manager, digests(frozen), size)
        try:
            yield saver
            saver.wait()
        except BaseException:
            with (
                contextlib.suppress(OutputError),
                saver.write_errors(),
            ):  # report the first error, not a later one
                manager.close()
            raise
        with saver.write_errors():
            manager.close()


def what_is_saved(checkpoints: Checkpoints | None) -> str:
    """Says what an interrupted run has saved and how to resume it."""
    if checkpoints is None:
        return "The run saves no checkpoints; the trained state is the error's `state`."
    directory = Path(checkpoints.directory).absolute()
    steps = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    if not steps:
        return f"No checkpoint was saved before in {directory}."
    return (
        f"The last checkpoint is of step {max(steps)}, in {directory}: resume from it with resume=True "
        "(--resume)."
    )


def restore_params(
    directory: str | Path, params: Any, *, step: int | Literal["newest", "best"] = "newest"
) -> Any:
    """Returns the params with the trainable part of a checkpoint, to evaluate or generate after a run.

    Args:
        directory: as given to Checkpoints.
        params: a tree with the same base model and adapters as the run's.
        step: the number of a checkpoint, the newest, or the best by Checkpoints.best.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if `params` differ from those of the run in structure or frozen values.
    """
    manager = open_manager(Path(directory).absolute(), None, scored=True, read_only=True)
    with contextlib.closing(manager):
        found = {"newest": manager.latest_step, "best": manager.best_step}.get(step, lambda: step)()
        if found is None or found not in manager.all_steps():
            raise FileNotFoundError(
                f"{directory} has no checkpoint {step!r}; it has {sorted(manager.all_steps())}."
            )
        trainable, frozen = partition(jax.tree.map(jnp.asarray, params))
        meta = read_meta(manager, found)
        check_same(meta["trainable"], digests(trainable), "trainable params", values=False)
        check_same(meta["frozen"], digests(frozen), "frozen params")
        return combine(read_arrays(manager, found, meta, trainable=trainable)[0], frozen)


def saved_settings(directory: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(step, `Checkpoints.settings`) of the newest checkpoint that can be read; None if there is none."""
    directory = Path(directory).absolute()
    if not any(p.name.isdigit() for p in directory.glob("*")):
        return None
    with quiet_absl(), contextlib.closing(open_manager(directory, None, True, True)) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            with contextlib.suppress(
                Exception
            ):  # `restore` reports what is wrong with a damaged one.
                return step, read_meta(manager, step).get("settings", {})
    return None


class Saver:
    """Saves states of one run; without a manager, all methods do nothing."""

    def __init__(
        self, checkpoints: Checkpoints | None, manager: Any, frozen: dict[str, list], size: int
    ):
        self._checkpoints, self._manager, self._frozen = checkpoints, manager, frozen
        self._size = size  # bytes of a checkpoint
        self._names: set[str] | None = None  # metrics in the newest checkpoint's row

    def due(self, step: int, row: Row) -> bool:
        """Returns whether the state after `step` is to be saved."""
        if self._manager is None:
            return False
        return step % self._checkpoints.every == 0 or self._checkpoints.best in row

    def save(self, state: TrainState, source: BatchSource, history: list[Row]) -> None:
        """Starts to write a checkpoint of a good state; to an existing one, adds the row's new metrics."""
        step = int(state.step)
        if self._manager is None or step == 0:
            return
        row = history[-1] if history and history[-1]["step"] == step else {}
        rows = [_as_json(r) for r in history[-HISTORY_ROWS:]]
        if step == self._manager.latest_step():
            self._amend(step, row, rows)
            return
        meet(f"checkpoint {step}")
        trainable, _ = partition(state.params)
        parts, opt_parts = packed(trainable), packed(state.opt_state)
        carry_parts = packed(state.carry)
        if not all_finite(parts):
            raise DivergedError(f"diverged at step {step}: params are not finite; not saved.", step)
        meta = {
            "format": FORMAT,
            "step": step,
            "settings": dict(self._checkpoints.settings),
            "key": [str(jax.random.key_impl(state.key)), jax.random.key_data(state.key).tolist()],
            "data": gathered(source.position()),
            "history": rows,
            "frozen": self._frozen,
            "trainable": digests(trainable, parts),
            "opt_state": digests(state.opt_state, opt_parts),
            "carry": digests(state.carry, carry_parts),
        }
        items = ocp.args.Composite(
            trainable=ocp.args.StandardSave(parts or NOTHING),
            opt_state=ocp.args.StandardSave(opt_parts or NOTHING),
            meta=ocp.args.JsonSave(meta | {"checksum": json_checksum(meta)}),
            **({"carry": ocp.args.StandardSave(carry_parts)} if carry_parts else {}),
        )
        check_room(Path(self._manager.directory), self._size)
        with self.write_errors():
            self._manager.save(step, args=items, metrics=self._score(row))
        self._names = set(row)

    def _amend(self, step, row, rows):
        """Adds metrics to a complete checkpoint's row: an evaluation after the last batch."""
        if self._names is None or row.keys() <= self._names:
            return
        self.wait()
        meet(f"row of checkpoint {step}")  # The checkpoint is complete on all hosts.
        if jax.process_index() == 0:
            with self.write_errors():
                amend(Path(self._manager.directory) / str(step), rows, self._score(row))

    def wait(self) -> None:
        """Waits until the checkpoint that `save` started is written."""
        if self._manager is not None:
            with self.write_errors():
                self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises the error of a checkpoint write that failed in the background."""
        if self._manager is not None:
            with self.write_errors():
                self._manager.check_for_errors()

    @contextlib.contextmanager
    def write_errors(self) -> Iterator[None]:
        """Converts any error inside the block to an OutputError."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types.
            directory = self._manager.directory
            raise OutputError(
                f"a checkpoint of {size_text(self._size)} could not be written to {directory}: "
                f"{reason(error)}; earlier ones are kept. {free(directory)}Make room or choose another place."
            ) from error

    def restore(self, state: TrainState, source: BatchSource) -> tuple[TrainState, list[Row]]:
        """Returns the newest complete checkpoint and its rows, or `state` and no rows if there is none.

        An unreadable checkpoint is renamed to corrupt-<step>, and the previous one is used.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if self._manager else []
        if not steps:
            return state, []
        if not self._checkpoints.resume:
            raise OutputError(
                f"{self._manager.directory} has checkpoints up to step {steps[0]}; resume from them "
                "(resume=True) or choose another directory."
            )
        for step in steps:
            try:
                meta = read_meta(self._manager, step)
                state = state._replace(carry=filled(state.carry, meta.get("carry", {}), state))
                self._check(meta, state)
                parts = dict(trainable=partition(state.params)[0], opt_state=state.opt_state)
                if jax.tree.leaves(state.carry):
                    parts["carry"] = state.carry
                arrays = read_arrays(self._manager, step, meta, **parts)
            except MismatchError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many types for bad files.
                self._set_aside(step, error)
                continue
            source.seek(own_position(meta["data"]))
            return restored_state(state, meta, *arrays), meta["history"]
        raise OutputError(f"{self._manager.directory}: no checkpoint of {steps} can be read.")

    def _check(self, meta, state):
        check_same(meta["frozen"], self._frozen, "frozen params")
        trainable, _ = partition(state.params)
        check_same(meta["trainable"], digests(trainable), "trainable params", values=False)
        check_same(meta["opt_state"], digests(state.opt_state), "optimizer state", values=False)
        check_same(meta.get("carry", {}), digests(state.carry), "arrays of the carry", values=False)
        own_position(meta["data"])

    def _score(self, row):
        """Orbax's metrics of a checkpoint: the lowest score is the best."""
        if self._checkpoints.best is None:
            return None
        value = float(row.get(self._checkpoints.best, math.nan))
        sign = 1 if self._checkpoints.mode == "min" else -1
        return {"score": sign * value if math.isfinite(value) else math.inf}

    def _set_aside(self, step, error):
        directory = Path(self._manager.directory)
        aside = directory / f"corrupt-{step}"
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        warnings.warn(
            f"checkpoint {step} cannot be read ({reason}); it is moved to {aside}, and the previous "
            "one is used.",
            stacklevel=2,
        )
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(directory / str(step), aside)
        self._manager.reload()


def _as_json(row):
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
