"""Contents of a checkpoint directory: how Orbax stores them, and what must be equal on resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxft.adapters import combine, partition, path_name
from jaxft.parallel import lay_out
from jaxft.train.digest import digests
from jaxft.train.packing import packed_shapes, unpacked
from jaxft.train.state import TrainState

FORMAT = 3  # 2: small leaves are stacked; 3: the metadata of a checkpoint has a checksum too
NOTHING = {"nothing": np.zeros((), np.int32)}  # Orbax does not accept an empty tree.


class MismatchError(ValueError):
    """The checkpoint is of a model, adapter or optimizer other than the run's."""


def open_manager(
    directory: Path, last: int | None, scored: bool, read_only: bool = False
) -> ocp.CheckpointManager:
    """Opens Orbax's manager, which keeps the `last` newest and, if `scored`, the lowest-scored one."""
    policies = ocp.checkpoint_managers
    score = lambda metrics: metrics["score"]
    best = policies.BestN(
        get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    kept = [policies.LatestN(last), best] if scored else [policies.LatestN(last)]
    options = ocp.CheckpointManagerOptions(
        best_fn=score if scored else None,  # otherwise Orbax writes no scores
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
        save_interval_steps=0 if read_only else 1,
    )
    return ocp.CheckpointManager(directory, options=options)


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Reads the metadata of a step's checkpoint.

    Raises:
        OSError: if the metadata differ from their checksum.
        MismatchError: if the format is not FORMAT.
    """
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    said, found = meta.get("checksum"), {k: v for k, v in meta.items() if k != "checksum"}
    whole = said == json_checksum(found)
    if not whole and (said is not None or found.get("format") not in range(FORMAT)):
        raise OSError(f"the metadata of checkpoint {step} differs from its checksum")
    if found["format"] != FORMAT:
        raise MismatchError(
            f"checkpoint {step} has format {found['format']}, this jaxft reads {FORMAT}: finish the run "
            "with the version that began it, or start in another directory."
        )
    return found


def amend(checkpoint: Path, history: list, score: dict[str, float] | None) -> None:
    """Replaces the history and the score of a complete checkpoint, which Orbax stores as JSON.

    Each file is replaced atomically: a killed run leaves the old file or the new one.
    """
    file = checkpoint / "meta" / "metadata"
    meta = json.loads(file.read_text()) | {"history": history}
    meta["checksum"] = json_checksum({k: v for k, v in meta.items() if k != "checksum"})
    files = {file: meta} | ({} if score is None else {checkpoint / "metrics" / "metrics": score})
    for file, content in files.items():
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(content))
        os.replace(new, file)


def json_checksum(meta: Mapping[str, Any]) -> str:
    """Checksum of `meta` as read back from JSON, to detect a key, position or step that a disk changed."""
    text = json.dumps(json.loads(json.dumps(meta)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_arrays(
    manager: ocp.CheckpointManager, step: int, meta: Mapping[str, Any], **parts: Any
) -> list[Any]:
    """Restores the named parts with the shardings of the given ones and verifies their checksums."""
    shapes = {name: packed_shapes(part) for name, part in parts.items()}
    wanted = {name: ocp.args.StandardRestore(of or NOTHING) for name, of in shapes.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**wanted))
    for name, part in parts.items():
        if shapes[name] and digests(part, restored[name]) != meta[name]:
            raise OSError(f"{name} differs from its checksum")
    return [unpacked(restored[name], part) for name, part in parts.items()]


def restored_state(
    state: TrainState, meta: Mapping[str, Any], trainable: Any, opt_state: Any, carry: Any = None
) -> TrainState:
    """Restores the state of a checkpoint; the frozen params are those of `state`."""
    impl, data = meta["key"]
    key = jax.random.wrap_key_data(jnp.array(data, jnp.uint32), impl=impl)
    params = combine(trainable, partition(state.params)[1])
    step = lay_out(jnp.array(meta["step"], jnp.int32), state.step.sharding)
    return TrainState(step, params, opt_state, carry, lay_out(key, state.key.sharding))


def filled(carry: Any, saved: Mapping[str, list], state: TrainState) -> Any:
    """Adds arrays shaped as saved to dicts of the carry that are empty at the start, such as a rollout."""
    whole, known = carry, {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(carry)}
    for path in saved.keys() - known:
        shape, dtype, _ = saved[path]
        *outer, last = path.split("/")
        if _empty_at(carry, outer):
            x = lay_out(jnp.zeros(shape, dtype), state.step.sharding)
            whole = _with_entry(whole, outer, last, x)
    return whole


def _empty_at(tree, names):
    """Returns whether the path `names` through nested dicts leads into an empty dict."""
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


def check_same(
    saved: Mapping[str, list], now: Mapping[str, list], what: str, values: bool = True
) -> None:
    """Raises MismatchError if two results of `digests` differ; with values=False, only in structure."""
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
def quiet_absl() -> Iterator[None]:
    """Silences Orbax's tracebacks in the log: `Saver.write_errors` reports their errors in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def own_position(positions: list[Any]) -> Any:
    """Selects this process's position from those saved, one per process; any one if all are equal."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    if all(position == positions[0] for position in positions):
        return positions[0]
    raise MismatchError(
        f"resume: saved by {len(positions)} processes with separate data positions, now there are "
        f"{jax.process_count()}; start as many as before, or take batches whose position all share "
        "(jaxft.data's do)."
    )
