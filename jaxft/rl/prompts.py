"""Prompts in an order that is shuffled each epoch, with their records and columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.generation import bucket

MIN_BUCKET = 16  # smallest bucket of prompt and response lengths, in tokens


class Asked(NamedTuple):
    """The P prompts of one draw."""

    ids: Sequence[Sequence[int]]
    records: Sequence[Mapping[str, Any]]
    columns: Mapping[str, np.ndarray] = {}  # name -> [P, ...], such as images
    # Prompt columns of a batch, whose responses then get the maximum; None: as few as needed.
    width: int | None = None
    following: Callable[[], Asked] | None = None  # the next draw
    number: int = 0  # of the draw


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to draw from, `per_step` at a time.

    Args:
        ids: token ids of each prompt.
        per_step: prompts per draw.
        records: one record per prompt, for the rewards; None: empty records.
        columns: name -> [len(ids), ...], any arrays that belong to prompts, such as images, or columns of
            `data.prompt_columns`, whose images are loaded when they are drawn: the sampler gets
            the rows of its prompts as `columns=`, and the batch gets one row for each response.
        seed: seed of the order, a new permutation each epoch.

    Raises:
        ValueError: if prompts, records and columns differ in number, or a name contains "/".
    """

    ids: Sequence[Sequence[int]]
    per_step: int
    records: Sequence[Mapping[str, Any]] | None = None
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        records = [{}] * len(self.ids) if self.records is None else self.records
        object.__setattr__(self, "records", records)
        if self.per_step < 1 or len(self.ids) != len(records) or not records:
            raise ValueError(
                f"Prompts: {len(self.ids)} prompts for {len(records)} records, {self.per_step} a step; there "
                "must be equally many of both, and at least one of each."
            )
        for name, column in self.columns.items():
            if len(column) != len(self.ids) or "/" in name:
                raise ValueError(
                    f"Prompts: column {name!r} has {len(column)} rows for {len(self.ids)} prompts; it needs "
                    "one row per prompt, and no '/' in its name."
                )

    def chosen(self, draw: int) -> list[int]:
        """The numbers of the prompts of a draw."""
        return prompts_of(draw, self.per_step, len(self.ids), self.seed)

    def pick(self, draw: int, fixed: bool = False) -> Asked:
        """The prompts of a draw.

        Args:
            fixed: gives the batches of all draws the same shape, that of the longest prompt.
        """
        numbers = self.chosen(draw)
        width = bucket(max(map(len, self.ids)), MIN_BUCKET) if fixed else None
        return Asked(
            ids=[self.ids[i] for i in numbers],
            records=[self.records[i] for i in numbers],
            columns={
                name: rows_of_column(column, numbers) for name, column in self.columns.items()
            },
            width=width,
            following=lambda: self.pick(draw + 1, fixed),
            number=draw,
        )


def rows_of_column(column: Any, numbers: Sequence[int]) -> np.ndarray:
    """The rows of prompts, which a column that is loaded late (`data.LateColumn`) reads now."""
    late = getattr(column, "rows", None)
    return np.asarray(column)[numbers] if late is None else late(numbers)


def prompts_of(draw: int, count: int, size: int, seed: int) -> list[int]:
    """Numbers of the draw-th `count` of `size` prompts, in an order shuffled each epoch."""
    places = np.arange(draw * count, (draw + 1) * count)
    order = {
        epoch: np.random.default_rng((seed, epoch)).permutation(size)
        for epoch in set((places // size).tolist())
    }
    return [int(order[place // size][place % size]) for place in places.tolist()]
