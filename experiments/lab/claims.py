"""Claims that hold or fail by their numbers: a table, a file and an exit code."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from jaxft.output import writing

DIRECTIONS = {
    "above": lambda x, bound: x > bound,
    "at least": lambda x, bound: x >= bound,
    "below": lambda x, bound: x < bound,
    "at most": lambda x, bound: x <= bound,
    "equal to": lambda x, bound: x == bound,
    "within": lambda x, bound: bound[0] <= x <= bound[1],
}
Direction = Literal[tuple(DIRECTIONS)]
# The part of a number that must satisfy the bound -> its text on the pages.
PARTS = {"estimate": "", "all": " (all of the interval)", "any": " (some of the interval)"}


@dataclasses.dataclass(frozen=True)
class Number:
    """One measured number and its bound.

    `by` says what must satisfy the bound: the estimate, all of the interval (a number without an interval
    then fails), or any part of it (a number without an interval then holds, because nothing contradicts
    it). NaN never holds.
    """

    estimate: float
    direction: Direction
    bound: float | tuple[float, float]  # a pair, both ends included, for "within"
    low: float | None = None  # lower end of the 95 % interval; None: one value
    high: float | None = None
    seeds: int | None = None  # number of seeds whose mean or worst the estimate is
    by: Literal[tuple(PARTS)] = "estimate"
    label: str = ""
    style: str = ".3f"  # format of the shown number; the file has all digits
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Returns whether the number satisfies its bound."""
        inside = lambda x: bool(DIRECTIONS[self.direction](x, self.bound))
        if self.by == "estimate":
            return inside(self.estimate)
        if self.low is None or self.high is None:
            return self.by == "any" and not math.isnan(self.estimate)
        return {"all": all, "any": any}[self.by](map(inside, (self.low, self.high)))

    @property
    def shown(self) -> str:
        """Formats the number: label, estimate, interval, unit."""
        text = format(self.estimate, self.style)
        if self.low is not None and self.high is not None:
            text += f" [{self.low:{self.style}}, {self.high:{self.style}}]"
        return " ".join(filter(None, (self.label, text, self.unit)))

    @property
    def needed(self) -> str:
        """Formats the bound."""
        ends = self.bound if isinstance(self.bound, tuple) else (self.bound,)
        return f"{self.direction} {' to '.join(f'{x:.4g}' for x in ends)}{PARTS[self.by]}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table; it holds if all of its numbers hold."""

    text: str
    paper: str  # the paper's statement
    numbers: Sequence[Number]
    detail: str = ""  # further measurements

    @property
    def holds(self) -> bool:
        """Returns whether every number satisfies its bound."""
        return all(number.holds for number in self.numbers)

    @property
    def measured(self) -> str:
        """Formats the measured numbers; a number with two bounds appears once."""
        return "; ".join(dict.fromkeys(number.shown for number in self.numbers))

    @property
    def here(self) -> str:
        """Formats the measured numbers, then the detail."""
        return "; ".join(filter(None, [self.measured, self.detail]))

    @property
    def needed(self) -> str:
        """Formats the bounds; a bound that several numbers share appears once."""
        return "; ".join(dict.fromkeys(number.needed for number in self.numbers))

    def plain(self) -> dict[str, Any]:
        """Converts the claim to JSON; infinities and NaN, which JSON lacks, become "inf", "-inf", "nan"."""
        return _plain(dataclasses.asdict(self)) | {"here": self.here, "holds": self.holds}

    @classmethod
    def parse(cls, row: dict[str, Any]) -> Claim:
        """Reads the claim from `plain`; `holds` is not read but computed from the numbers."""
        return cls(row["text"], row["paper"], tuple(map(_number, row["numbers"])), row["detail"])


def mean(
    values: Sequence[float], direction: Direction, bound: Any, by: str = "all", **more: Any
) -> Number:
    """Mean of one number per seed, with its interval."""
    estimate, low, high = interval(values)
    ends = dict(low=low, high=high) if len(values) > 1 else {}
    return Number(estimate, direction, bound, by=by, seeds=len(values), **ends, **more)


def by_estimate(values: Sequence[float], *bound: Any, by: str = "", **more: Any) -> Number:
    """Mean of one number per seed, judged by its estimate: one seed has no interval."""
    del by
    return mean(values, *bound, by="estimate", **more)


def worst(values: Sequence[float], direction: Direction, bound: float, **more: Any) -> Number:
    """Worst of one number per seed: the smallest for "above" and "at least", else the largest."""
    extreme = np.min if direction in ("above", "at least") else np.max
    label = {"label": "worst seed"} | more
    return Number(float(extreme(values)), direction, bound, seeds=len(values), **label)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of one number per seed, by Student's t; one value has no interval (NaN)."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return mean, mean - float(half), mean + float(half)


def show(values: Sequence[float], digits: int = 3) -> str:
    """Formats mean and interval; of one value only this value."""
    mean, low, high = interval(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(claims: Sequence[Claim], metrics: dict, directory: pathlib.Path) -> int:
    """Prints the table, writes metrics.json; returns the exit code, 1 if a claim does not hold."""
    table = Table("claim", "paper", "here", "holds")
    for claim in claims:
        # rich would interpret "E[r]" and "[nan, nan]" as markup.
        cells = map(escape, (claim.text, claim.paper, claim.here))
        table.add_row(*cells, "yes" if claim.holds else "NO")
    Console(width=140).print(table)
    rows = [claim.plain() for claim in claims]
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory):
        (directory / "metrics.json").write_text(
            json.dumps(metrics | {"claims": rows}, indent=2) + "\n"
        )
    print(f"metrics and figure in {directory}")
    return 0 if all(claim.holds for claim in claims) else 1


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(row):
    # Counts stay integers: their style is "d".
    real = lambda x: float(x) if isinstance(x, str) else x
    read = {name: real(row[name]) for name in ("estimate", "low", "high")}
    bound = row["bound"]
    pair = tuple(map(real, bound)) if isinstance(bound, list) else real(bound)
    return Number(**row | read | {"bound": pair})
