"""Experience in groups that share a prompt, and without the rows that teach nothing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxft.rl.rollouts import WHOLE, Batch

SIZES = 4  # numbers of rows to which a batch can shrink, so as many programs


def in_groups(batch: Batch, size: int) -> Batch:
    """The batch [B, ...] as [B / size, size, ...]: objectives then compute each group's prompt once.

    See jaxft.objectives.sharing. The loss and its gradient are those of the rows, up to rounding. Whole
    groups are then what updates, microbatches and devices divide.

    Raises:
        ValueError: if `size` does not divide the rows, or the prompts of a group differ.
    """
    rows = len(batch["tokens"])
    if size < 1 or rows % size:
        raise ValueError(f"share_prompts: groups of {size} do not divide {rows} responses.")
    group = lambda x: x.reshape(rows // size, size, *x.shape[1:]) if np.ndim(x) else x
    grouped = jax.tree.map(group, dict(batch))
    width = batch["tokens"].shape[1] - batch["completion_mask"].shape[1]
    for name in WHOLE:
        prompts = grouped[name][:, :, :width] if name in grouped else None
        # Arrays of the device come from `collect_on_device`, which repeats the prompts itself.
        if isinstance(prompts, np.ndarray) and np.any(prompts != prompts[:, :1]):
            raise ValueError(
                f"share_prompts: {name!r} of the prompts differ within groups of {size} adjacent rows; a "
                "sampler must return the responses to a prompt side by side, with its padding alike."
            )
    return grouped


def without_idle(found: Batch, multiple: int) -> tuple[np.ndarray, Batch]:
    """(the rows to keep, the columns that they get), so that rows whose advantage is 0 cost nothing.

    A policy loss of a row with advantage 0 is 0, and so is its gradient, but reductions divide by numbers
    of rows or tokens. The kept rows therefore get `absent_mask` [K, R, ...], the completion_mask of the
    rows left out (R a kept row, the rest empty), and `stats` [K, 1 + R, ...] of both, NaN where empty, with
    the stat `length`. The number K is one of at most `SIZES`: the smallest quarter of the rows, rounded up
    to a `multiple`, that holds all rows with an advantage. Idle rows fill it up, so that it is never empty.

    Args:
        found: `advantages`, `completion_mask` and `stats` on the host, of rows or groups (first axis).
        multiple: what must divide K: microbatches x devices.

    Raises:
        ValueError: without advantages, or for a multiple below 1.
    """
    if multiple < 1:
        raise ValueError(f"drop_idle: microbatches x devices must be at least 1, got {multiple}.")
    if "advantages" not in found:
        raise ValueError(
            "drop_idle: the batch has no advantages, by which idle rows are known (nft has none); keep all "
            "rows: collect(..., drop_idle=False)."
        )
    given, mask = np.asarray(found["advantages"]), np.asarray(found["completion_mask"]).astype(bool)
    given = given if given.ndim == mask.ndim else given[..., None]
    live = np.any((given != 0) & mask, axis=tuple(range(1, mask.ndim)))
    count = _kept(len(live), int(live.sum()), multiple)
    # A stable sort keeps the order of the rows, and with it that of the sums.
    order = np.argsort(~live, kind="stable")
    kept, absent = np.sort(order[:count]), order[count:]
    if not len(absent):
        return kept, {}
    per_row = -(-len(absent) // count)

    def beside(x: Any, empty: Any):
        rest = np.full((count * per_row, *x.shape[1:]), empty, x.dtype)
        rest[: len(absent)] = x[absent]
        return rest.reshape(count, per_row, *x.shape[1:])

    stats = {name: np.asarray(x, np.float32) for name, x in found.get("stats", {}).items()}
    stats["length"] = mask.sum(axis=-1).astype(np.float32)
    both = lambda x: np.concatenate([x[kept][:, None], beside(x, np.nan)], axis=1)
    columns = {"absent_mask": beside(mask, False), "stats": jax.tree.map(both, stats)}
    return kept, columns


def _kept(rows: int, live: int, multiple: int) -> int:
    up = lambda count: min(rows, -(-count // multiple) * multiple)
    sizes = [up(-(-rows * part // SIZES)) for part in range(1, SIZES + 1)]
    return next(size for size in sizes if size >= live)
