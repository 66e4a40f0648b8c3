"""What the scripts of papers share: claims measured over seeds, as a table, a file and an exit code."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from jaxft.output import writing


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table."""

    text: str
    paper: str  # what the paper says
    here: str  # what was measured
    holds: bool


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of one number a seed, by Student's t; one value has no interval (NaN)."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return mean, mean - float(half), mean + float(half)


def show(values: Sequence[float], digits: int = 3) -> str:
    """Mean and interval as text."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(claims: Sequence[Claim], metrics: dict, directory: pathlib.Path) -> int:
    """Prints the table, writes metrics.json; returns the exit code, 1 if a claim does not hold."""
    table = Table("claim", "paper", "here", "holds")
    for claim in claims:
        # "E[r]" and "[nan, nan]" would be taken for rich's markup.
        cells = map(escape, (claim.text, claim.paper, claim.here))
        table.add_row(*cells, "yes" if claim.holds else "NO")
    Console(width=140).print(table)
    rows = [dataclasses.asdict(claim) for claim in claims]
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory):
        (directory / "metrics.json").write_text(
            json.dumps(metrics | {"claims": rows}, indent=2) + "\n"
        )
    print(f"metrics and figure in {directory}")
    return 0 if all(claim.holds for claim in claims) else 1
