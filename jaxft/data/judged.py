"""Preference pairs from a judge: samples of a model are scored against a reference and paired.

A judge is any function of texts that returns a number, or None for no verdict. `parse_green` and
`green_score` form a judge from the text that GREEN's language model writes about two radiology reports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.data.errors import DataError
from jaxft.data.preference import best_worst
from jaxft.data.records import Record

_SECTION = r"\[{}\]:\s*(.*?)\s*(?=\n\s*\[[A-Z][^\]\n]*\]:|\Z)"
_COUNT = re.compile(r"^\(([a-f1-6])\)[^\n]*?:\s*(\d+)(?![\d/])", re.MULTILINE)
_LETTER = re.compile(r"^\([a-f1-6]\)", re.MULTILINE)


class GreenCounts(NamedTuple):
    """Matched findings and errors of a candidate report against its reference."""

    matched: int  # findings in both
    significant: tuple[int, ...]  # clinically significant errors of the six kinds (a) to (f):
    # false finding, missing finding, wrong location, wrong severity, comparison that is not in the
    # reference, omitted comparison
    insignificant: tuple[int, ...] = (0,) * 6  # insignificant errors; no score uses them


class Judged(NamedTuple):
    """Pairs, with the numbers of samples and prompts that gave none."""

    pairs: list[Record]
    unscored: int  # samples without a score, excluded
    undecided: int  # prompts whose scores are too close, or fewer than two


def green_score(counts: GreenCounts) -> float:
    """matched / (matched + significant errors), in [0, 1]; 0 if nothing matches.

    GREEN: Ostmeier et al., 2024, arxiv.org/abs/2405.03595, eq. 1. A true finding that is not in the
    reference has no cost, so it does not lower a longer report's score.

    Raises:
        ValueError: for negative counts.
    """
    if min(counts.matched, *counts.significant) < 0:
        raise ValueError(f"green_score: counts must be at least 0, got {counts}.")
    if counts.matched == 0:
        return 0.0
    return counts.matched / (counts.matched + sum(counts.significant))


def parse_green(text: str) -> GreenCounts | None:
    """Parses the counts from the text of GREEN's language model; None if unreadable.

    It reads `[Clinically Significant Errors]:` and `[Clinically Insignificant Errors]:` (may be absent), each
    with lines "(a) ...: 2. ...", and `[Matched Findings]:` with "3. ..."; "No ..." means none. A kind without
    a line counts 0. A line without its number, or a section with neither form, makes the text unreadable: to
    count it as 0, as GREEN's own parser does for its table, would reward samples that break the judge.
    """
    significant = _errors(_section(text, "Clinically Significant Errors"))
    insignificant = _errors(_section(text, "Clinically Insignificant Errors") or "No")
    matched = _section(text, "Matched Findings")
    if matched is None or significant is None or insignificant is None:
        return None
    first = "0" if _is_none(matched) else (re.match(r"\d+(?=\.|\s|$)", matched) or [None])[0]
    return None if first is None else GreenCounts(int(first), significant, insignificant)


def clean_report(text: str) -> str:
    """Normalises text for the judge: no [spans in brackets], no **, single blanks, lower case."""
    return " ".join(re.sub(r"\[[^\]]*\]|\*\*", "", text).split()).lower()


def judge_pairs(
    samples: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[float | None]],
    *,
    min_gap: float = 1e-8,
    choose: Callable[..., list[Record]] = best_worst,
) -> Judged:
    """Makes pairs from judged samples; by default one per prompt, best against worst.

    Hein et al., 2024, arxiv.org/abs/2410.07025, section 3 (four samples, GREEN, 1e-8).

    Args:
        samples: records with `prompt` and `responses`; their other columns are kept.
        scores: for each record, one score per response; None or NaN: no verdict.
        min_gap: two scores give a pair only if they differ by more than this.
        choose: `best_worst` or `all_pairs`.

    Raises:
        DataError: if a response lacks a score (finite, None or NaN).
    """
    if len(samples) != len(scores):
        raise DataError(f"judge_pairs: {len(samples)} records and {len(scores)} lists of scores.")
    pairs, unscored, undecided = [], 0, 0
    for i, (record, given) in enumerate(zip(samples, scores, strict=True)):
        responses = record["responses"]
        if len(responses) != len(given):
            raise DataError(
                f"judge_pairs: record {i} has {len(responses)} responses and {len(given)} scores."
            )
        known = [(r, float(s)) for r, s in zip(responses, given, strict=True) if _told(s)]
        if any(math.isinf(score) for _, score in known):
            raise DataError(f"judge_pairs: record {i} has an infinite score; None means no score.")
        unscored += len(given) - len(known)
        made = []
        if len(known) > 1:
            told = {"responses": [r for r, _ in known], "scores": [s for _, s in known]}
            made = choose([{**record, **told}], min_gap=min_gap)
        undecided += not made
        pairs += made
    return Judged(pairs, unscored, undecided)


def _section(text, name):
    found = re.search(_SECTION.format(re.escape(name)), text, re.DOTALL)
    return None if found is None else found[1]


def _is_none(section):
    return re.match(r"no\b", section, re.IGNORECASE) is not None


def _errors(section):
    """Counts the six kinds of errors; None if unreadable."""
    if section is None:
        return None
    if _is_none(section):
        return (0,) * 6
    found = _COUNT.findall(section)
    if not found or len(found) != len(_LETTER.findall(section)):
        return None
    counts = [0] * 6
    for kind, count in found:
        counts["abcdef".find(kind) if kind in "abcdef" else int(kind) - 1] += int(count)
    return tuple(counts)


def _told(score):
    return score is not None and not math.isnan(score)
