"""Synthetic chest X-rays for cxr_preference.py: evidence of twelve findings, reports, and the judge.

An image is twelve tokens, one a finding: present, absent or unclear, and now and then wrong. A report names
the findings that are there, then three that are not, chosen by chance. The judge counts as GREEN does: that a
report says more true negatives than its reference costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.worlds import toy_text as toy
from jaxft.data import GreenCounts

FINDINGS, PREVALENCE, UNCLEAR, WRONG = 12, 0.18, 0.15, 0.05
NEGATIVES = 3  # negative findings in a report
PRESENT, ABSENT, UNKNOWN, ASK, END = range(5)
POSITIVE, NEGATIVE = 5, 5 + FINDINGS  # ids of "finding 0 is there" and "finding 0 is not"
VOCABULARY = 5 + 2 * FINDINGS + 1
SIZE = FINDINGS + NEGATIVES + 1  # tokens of the longest report
LENGTH = FINDINGS + 1 + SIZE


class Cases(NamedTuple):
    """Images with their true findings."""

    prompts: np.ndarray  # [N, FINDINGS + 1] evidence, and the token that asks for a report
    truth: np.ndarray  # [N, FINDINGS] which findings are there
    reports: list[list[int]]  # reference reports, with END
    images: np.ndarray | None = None  # [N, 1, H, W, C], of xrays.py


def draw(rng: np.random.Generator, count: int) -> Cases:
    """New cases."""
    truth = rng.random((count, FINDINGS)) < PREVALENCE
    seen = truth ^ (rng.random(truth.shape) < WRONG)
    evidence = np.where(seen, PRESENT, ABSENT)
    evidence = np.where(rng.random(truth.shape) < UNCLEAR, UNKNOWN, evidence)
    prompts = np.concatenate([evidence, np.full((count, 1), ASK)], axis=1)
    return Cases(prompts, truth, [_report(rng, row) for row in truth])


def _report(rng, truth):
    there, absent = np.flatnonzero(truth), np.flatnonzero(~truth)
    some = rng.choice(absent, min(NEGATIVES, len(absent)), replace=False)
    return [*(POSITIVE + there), *(NEGATIVE + some), END]


def rows(
    prompts: np.ndarray, reports: Sequence[Sequence[int]], images: np.ndarray | None = None
) -> dict[str, Any]:
    """A batch of prompts and reports, padded, with the images if there are any."""
    mask = np.arange(SIZE) < np.array([len(report) for report in reports])[:, None]
    tokens = np.zeros((len(reports), SIZE), np.int32)
    tokens[mask] = np.concatenate(reports)
    made = {name: np.asarray(x) for name, x in toy.rows(prompts, tokens, mask).items()}
    return made if images is None else made | {"images": images}


def judge(report: Sequence[int], truth: np.ndarray, reference: Sequence[int]) -> GreenCounts | None:
    """The counts of a report; None if it has no end, which the judge cannot read.

    Errors are (a) findings that are not there and (b) those that are and go unsaid, or are denied, each of
    which counts twice: as missing and as a false statement.
    """
    if not report or report[-1] != END:
        return None
    said = {token - POSITIVE for token in report if POSITIVE <= token < NEGATIVE}
    denied = {token - NEGATIVE for token in report if NEGATIVE <= token < NEGATIVE + FINDINGS}
    there = set(np.flatnonzero(truth).tolist())
    matched = len((set(report) & set(reference)) - {END})
    wrong = len(said - there) + len(denied & there)
    return GreenCounts(matched, (wrong, len(there - said), 0, 0, 0, 0))


def finding_f1(reports: Sequence[Sequence[int]], truth: np.ndarray) -> float:
    """F1 of the findings that reports say are there, over all cases."""
    said = np.zeros(truth.shape, bool)
    for row, report in zip(said, reports, strict=True):
        row[[t - POSITIVE for t in report if POSITIVE <= t < NEGATIVE]] = True
    return float(2 * (said & truth).sum() / max(1, said.sum() + truth.sum()))
