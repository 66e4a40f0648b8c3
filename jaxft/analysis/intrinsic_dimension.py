"""The smallest random subspace in which fine-tuning keeps most of its score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

TrainFunction = Callable[[int, Sequence[int]], Sequence[float]]


class D90(NamedTuple):
    """The result of a search."""

    d: int | None  # the smallest d that reached the target; None: none of the grid did
    failing: int | None  # the largest failing d below it; None: the grid's first d passed
    scores: dict[int, list[float]]  # d -> a score for each seed


def satisfactory(full: float, *, share: float = 0.9, floor: float = 0.0) -> float:
    """floor + share (full - floor): the score that counts as solved.

    Li et al., 2018, arxiv.org/abs/1804.08838, and Aghajanyan et al., 2020, arxiv.org/abs/2012.13255: 90 %
    of full fine-tuning's. If a constant guess already scores close to 90 %, pass its score as
    `floor`.
    """
    return floor + share * (full - floor)


def d90_search(
    train_fn: TrainFunction,
    grid: Sequence[int],
    target: float,
    seeds: Sequence[int],
    *,
    agreement: float = 2 / 3,
    resolution: float = 1.1,
) -> D90:
    """The smallest d whose score reaches `target`, on a grid and then between its points.

    d grows along the grid until it reaches the target; then log d is bisected between the last failing
    and the first passing d. If the score is noisy in d, the result is one crossing of possibly
    several.

    Args:
        train_fn: (d, seeds) -> a score for each seed, higher is better; all seeds at once, so that
            it may `vmap` over them. Called once for each d.
        grid: numbers of dimensions, increasing.
        target: see `satisfactory`.
        seeds: passed to train_fn.
        agreement: the share of seeds that must reach the target: 2 of 3.
        resolution: bisection ends when the two differ by less than this factor, or by 1.

    Raises:
        ValueError: for a grid that is empty, not increasing or below 1, no seeds, or wrong scores.
    """
    grid, seeds = list(grid), list(seeds)
    if not grid or grid[0] < 1 or any(a >= b for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"d90_search: grid must increase from 1 or more, got {grid}.")
    if not seeds or not 0 < agreement <= 1 or resolution <= 1:
        raise ValueError(
            f"d90_search: needs seeds, 0 < agreement <= 1 and resolution > 1, got {seeds}, {agreement} "
            f"and {resolution}."
        )
    needed = math.ceil(agreement * len(seeds) - 1e-9)
    scores: dict[int, list[float]] = {}

    def passes(d):
        scores[d] = [float(score) for score in train_fn(d, seeds)]
        if len(scores[d]) != len(seeds):
            raise ValueError(
                f"d90_search: train_fn gave {len(scores[d])} scores for {len(seeds)} seeds at d = {d}."
            )
        return sum(score >= target for score in scores[d]) >= needed

    failing = passing = None
    for d in grid:
        if passes(d):
            passing = d
            break
        failing = d
    while passing and failing and passing > max(failing + 1, failing * resolution):
        middle = min(max(round(math.sqrt(failing * passing)), failing + 1), passing - 1)
        if passes(middle):
            passing = middle
        else:
            failing = middle
    return D90(passing, failing if passing else None, scores)
