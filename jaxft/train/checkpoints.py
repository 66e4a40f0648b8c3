"""Saving and resuming a run with Orbax: what trains, the optimizer, the key, the data position."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxft.adapters import combine, partition, path_name
from jaxft.output import OutputError, free, reason, size_text
from jaxft.parallel import gathered, lay_out, meet
from jaxft.train.batches import BatchSource
from jaxft.train.callbacks import Row
from jaxft.train.digest import all_finite, digests
from jaxft.train.errors import DivergedError
from jaxft.train.packing import packed, packed_shapes, unpacked
from jaxft.train.state import TrainState

FORMAT = 3  # 2: small leaves are stacked; 3: what is said of a checkpoint has a checksum too
HISTORY_ROWS = 1000  # saved with a checkpoint
NOTHING = {"nothing": np.zeros((), np.int32)}  # Orbax takes no empty tree.


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and when `fit` saves, and whether it goes on from what is there.

    A checkpoint holds the trainable part of the params, the optimizer's state, the carry, the key, the data
    position and the last rows of the history; of the frozen part only shapes and checksums, which
    must be the same on resume. It is written beside the training and appears under its number only
    when complete. The final state is always saved.
    """

    directory: str | Path
    every: int = 500  # steps between saves
    last: int = 3  # newest checkpoints kept
    best: str | None = None  # name of a metric such as "eval/loss": each step that has it is
    # saved, and the best one is kept besides the newest
    mode: Literal["min", "max"] = "min"  # which value of `best` is the best
    resume: bool = False  # go on from the newest checkpoint, if there is one
    # what the run was told, as JSON takes it; saved for `saved_settings`, and not compared here
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
    """What `fit` saves and restores with, for a run that begins at `state`.

    Raises:
        OutputError: if the directory cannot be written or has no room for one checkpoint.
    """
    if checkpoints is None:
        yield Saver(None, None, {}, 0)
        return
    trainable, frozen = partition(state.params)
    size = sum(x.nbytes for x in jax.tree.leaves((trainable, state.opt_state, state.carry)))
    directory = writable_directory(checkpoints.directory, size)
    with _quiet_absl():
        manager = _manager(directory, checkpoints.last, checkpoints.best is not None)
        saver = Saver(checkpoints, manager, digests(frozen), size)
        try:
            yield saver
            saver.wait()
        except BaseException:
            with (
                contextlib.suppress(OutputError),
                saver.write_errors(),
            ):  # the first error is the one
                manager.close()
            raise
        with saver.write_errors():
            manager.close()


def what_is_saved(checkpoints: Checkpoints | None) -> str:
    """What a run that ends before its time has left, and how to go on."""
    if checkpoints is None:
        return "The run saves no checkpoints; what it trained is the error's `state`."
    directory = Path(checkpoints.directory).absolute()
    steps = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    if not steps:
        return f"No checkpoint was saved before in {directory}."
    return (
        f"The last checkpoint is of step {max(steps)}, in {directory}: go on from it with resume=True "
        "(--resume)."
    )


def restore_params(
    directory: str | Path, params: Any, *, step: int | Literal["newest", "best"] = "newest"
) -> Any:
    """The params with the trainable part of a checkpoint: to evaluate or generate after a run.

    Args:
        directory: as given to Checkpoints.
        params: a tree made as for the run: same base model, same adapters.
        step: number of a checkpoint, or the newest, or the best by Checkpoints.best.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if `params` differ from those of the run in structure or frozen values.
    """
    manager = _manager(Path(directory).absolute(), None, scored=True, read_only=True)
    with contextlib.closing(manager):
        found = {"newest": manager.latest_step, "best": manager.best_step}.get(step, lambda: step)()
        if found is None or found not in manager.all_steps():
            raise FileNotFoundError(
                f"{directory} has no checkpoint {step!r}; it has {sorted(manager.all_steps())}."
            )
        trainable, frozen = partition(jax.tree.map(jnp.asarray, params))
        meta = _read_meta(manager, found)
        _check_same(meta["trainable"], digests(trainable), "trainable params", values=False)
        _check_same(meta["frozen"], digests(frozen), "frozen params")
        return combine(_read_arrays(manager, found, meta, trainable=trainable)[0], frozen)


def saved_settings(directory: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(step, `Checkpoints.settings`) of the newest checkpoint that can be read; None if there is none."""
    directory = Path(directory).absolute()
    if not any(p.name.isdigit() for p in directory.glob("*")):
        return None
    with _quiet_absl(), contextlib.closing(_manager(directory, None, True, True)) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            with contextlib.suppress(Exception):  # `restore` says of a damaged one what is wrong.
                return step, _read_meta(manager, step).get("settings", {})
    return None


class Saver:
    """Saves states of one run; all methods do nothing when it has no manager."""

    def __init__(
        self, checkpoints: Checkpoints | None, manager: Any, frozen: dict[str, list], size: int
    ):
        self._checkpoints, self._manager, self._frozen = checkpoints, manager, frozen
        self._size = size  # bytes of a checkpoint

    def due(self, step: int, row: Row) -> bool:
        """Whether the state after `step` is to be saved."""
        if self._manager is None:
            return False
        return step % self._checkpoints.every == 0 or self._checkpoints.best in row

    def save(self, state: TrainState, source: BatchSource, history: list[Row]) -> None:
        """Starts to write a checkpoint of a good state, unless it is there."""
        step = int(state.step)
        if self._manager is None or step in (0, self._manager.latest_step()):
            return
        meet(f"checkpoint {step}")
        trainable, _ = partition(state.params)
        parts, opt_parts = packed(trainable), packed(state.opt_state)
        carry_parts = packed(state.carry)
        if not all_finite(parts):
            raise DivergedError(f"diverged at step {step}: params are not finite; not saved.", step)
        row = history[-1] if history and history[-1]["step"] == step else {}
        meta = {
            "format": FORMAT,
            "step": step,
            "settings": dict(self._checkpoints.settings),
            "key": [str(jax.random.key_impl(state.key)), jax.random.key_data(state.key).tolist()],
            "data": gathered(source.position()),
            "history": [_as_json(r) for r in history[-HISTORY_ROWS:]],
            "frozen": self._frozen,
            "trainable": digests(trainable, parts),
            "opt_state": digests(state.opt_state, opt_parts),
            "carry": digests(state.carry, carry_parts),
        }
        items = ocp.args.Composite(
            trainable=ocp.args.StandardSave(parts or NOTHING),
            opt_state=ocp.args.StandardSave(opt_parts or NOTHING),
            meta=ocp.args.JsonSave(meta | {"checksum": _json_checksum(meta)}),
            **({"carry": ocp.args.StandardSave(carry_parts)} if carry_parts else {}),
        )
        _check_room(Path(self._manager.directory), self._size)
        with self.write_errors():
            self._manager.save(step, args=items, metrics=self._score(row))

    def wait(self) -> None:
        """Waits until what `save` started is written."""
        if self._manager is not None:
            with self.write_errors():
                self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises the error of a checkpoint that is written beside the training, once it has failed."""
        if self._manager is not None:
            with self.write_errors():
                self._manager.check_for_errors()

    @contextlib.contextmanager
    def write_errors(self) -> Iterator[None]:
        """Makes any error inside the block an OutputError."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds.
            directory = self._manager.directory
            raise OutputError(
                f"a checkpoint of {size_text(self._size)} could not be written to {directory}: "
                f"{reason(error)}; earlier ones are kept. {free(directory)}Make room or choose another place."
            ) from error

    def restore(self, state: TrainState, source: BatchSource) -> tuple[TrainState, list[Row]]:
        """The newest complete checkpoint and its rows, or `state` and no rows if there is none.

        A checkpoint that cannot be read is set aside as corrupt-<step>, and the one before is taken.
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
                meta = _read_meta(self._manager, step)
                state = state._replace(carry=_filled(state.carry, meta.get("carry", {}), state))
                self._check(meta, state)
                parts = dict(trainable=partition(state.params)[0], opt_state=state.opt_state)
                if jax.tree.leaves(state.carry):
                    parts["carry"] = state.carry
                arrays = _read_arrays(self._manager, step, meta, **parts)
            except MismatchError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for bad files.
                self._set_aside(step, error)
                continue
            source.seek(_own_position(meta["data"]))
            return _restored(state, meta, *arrays), meta["history"]
        raise OutputError(f"{self._manager.directory}: no checkpoint of {steps} can be read.")

    def _check(self, meta, state):
        _check_same(meta["frozen"], self._frozen, "frozen params")
        trainable, _ = partition(state.params)
        _check_same(meta["trainable"], digests(trainable), "trainable params", values=False)
        _check_same(meta["opt_state"], digests(state.opt_state), "optimizer state", values=False)
        _check_same(
            meta.get("carry", {}), digests(state.carry), "arrays of the carry", values=False
        )
        _own_position(meta["data"])

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
            f"checkpoint {step} cannot be read ({reason}); it is moved to {aside}, and the one before "
            "it is taken.",
            stacklevel=2,
        )
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(directory / str(step), aside)
        self._manager.reload()


class MismatchError(ValueError):
    """A checkpoint of another model, adapter or optimizer than the run's."""


def writable_directory(directory: str | Path, size: int = 0) -> Path:
    """The directory, made and probed by writing a file.

    Raises:
        OutputError: if it cannot be written or has less than `size` bytes free.
    """
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"probe" * 1000)
    except OSError as error:
        raise OutputError(
            f"cannot write to {directory}: {reason(error)}; make room or choose another."
        ) from error
    _check_room(directory, size)
    return directory


def _check_room(directory, size):
    room = shutil.disk_usage(directory).free
    if room < size:
        raise OutputError(
            f"{directory} has {size_text(room)} free, but one checkpoint takes {size_text(size)}; "
            "make room or choose another directory."
        )


def _manager(directory, last, scored, read_only=False):
    policies = ocp.checkpoint_managers
    score = lambda metrics: metrics["score"]
    best = policies.BestN(
        get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    kept = [policies.LatestN(last), best] if scored else [policies.LatestN(last)]
    options = ocp.CheckpointManagerOptions(
        best_fn=score if scored else None,  # without it Orbax writes no scores
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
        save_interval_steps=0 if read_only else 1,
    )
    return ocp.CheckpointManager(directory, options=options)


def _read_meta(manager, step):
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    said, found = meta.get("checksum"), {k: v for k, v in meta.items() if k != "checksum"}
    whole = said == _json_checksum(found)
    if not whole and (said is not None or found.get("format") not in range(FORMAT)):
        raise OSError(f"what checkpoint {step} says of itself differs from its checksum")
    if found["format"] != FORMAT:
        raise MismatchError(
            f"checkpoint {step} has format {found['format']}, this jaxft reads {FORMAT}: finish the run "
            "with the version that began it, or start in another directory."
        )
    return found


def _json_checksum(meta):
    """Of what JSON gives back: a key, a position or a step that a bad disk changed must not be taken."""
    text = json.dumps(json.loads(json.dumps(meta)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_arrays(manager, step, meta, **parts):
    """The named parts, restored with the shardings of those given and compared with their checksums."""
    shapes = {name: packed_shapes(part) for name, part in parts.items()}
    wanted = {name: ocp.args.StandardRestore(of or NOTHING) for name, of in shapes.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**wanted))
    for name, part in parts.items():
        if shapes[name] and digests(part, restored[name]) != meta[name]:
            raise OSError(f"{name} differs from its checksum")
    return [unpacked(restored[name], part) for name, part in parts.items()]


def _restored(state, meta, trainable, opt_state, carry=None):
    impl, data = meta["key"]
    key = jax.random.wrap_key_data(jnp.array(data, jnp.uint32), impl=impl)
    params = combine(trainable, partition(state.params)[1])
    step = lay_out(jnp.array(meta["step"], jnp.int32), state.step.sharding)
    return TrainState(step, params, opt_state, carry, lay_out(key, state.key.sharding))


def _filled(carry, saved, state):
    """The carry with arrays as saved in the dicts that are empty at the start: a rollout, say."""
    whole, known = carry, {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(carry)}
    for path in saved.keys() - known:
        shape, dtype, _ = saved[path]
        *outer, last = path.split("/")
        if _empty_at(carry, outer):
            x = lay_out(jnp.zeros(shape, dtype), state.step.sharding)
            whole = _with_entry(whole, outer, last, x)
    return whole


def _empty_at(tree, names):
    """Whether the way `names` through nested dicts leads into an empty one."""
    for name in names:
        if tree == {}:
            return True
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return isinstance(tree, dict) and not tree


def _with_entry(tree, outer, last, x):
    if not outer:
        return {**tree, last: x}
    return {**tree, outer[0]: _with_entry(tree.get(outer[0], {}), outer[1:], last, x)}


def _check_same(saved, now, what, values=True):
    """Raises MismatchError if two results of `digests` differ; without values, in structure."""
    describe = lambda entry: tuple(map(str, entry[: 3 if values else 2]))
    different = [k for k in (saved | now) if k not in saved or k not in now]
    different += [k for k in saved if k in now and describe(saved[k]) != describe(now[k])]
    if different:
        name = different[0]
        show = lambda d: (
            f"{d[name][1]}{d[name][0]} checksum {d[name][2]}" if name in d else "nothing"
        )
        raise MismatchError(
            f"resume: {len(different)} of {len(saved | now)} {what} differ from the checkpoint's. First "
            f"{name!r}: saved {show(saved)}, now {show(now)}. Use the same base model, adapters, "
            "optimizer, books and carry as before, or another directory."
        )


@contextlib.contextmanager
def _quiet_absl():
    """Without Orbax's tracebacks in the log: their errors come back as one line from `Saver.write_errors`."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _own_position(positions):
    """This process's, of those of the processes that saved; any one if all are the same."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    if all(position == positions[0] for position in positions):
        return positions[0]
    raise MismatchError(
        f"resume: saved by {len(positions)} processes with data positions of their own, now there are "
        f"{jax.process_count()}; start as many as before, or take batches whose position all share "
        "(jaxft.data's do)."
    )


def _as_json(row):
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
