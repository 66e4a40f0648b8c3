"""Confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of a success rate: Wilson, 1927, doi.org/10.2307/2276774; z = 1.96 for 95 %.

    Unlike rate ± z sqrt(p (1 - p) / n), it stays within 0..1 and does not vanish at 0 or n successes.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"wilson_interval: needs 0 <= successes <= trials and trials >= 1, got {successes} of "
            f"{trials}."
        )
    rate, square = successes / trials, z * z
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    half = spread / (1 + square / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Any, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) [...] of `values` [N, ...] over rows: percentile interval of resampled rows.

    Rows are drawn with replacement, as many as there are: Efron, 1979, doi.org/10.1214/aos/1176344552. What
    belongs together (the answers to one prompt, the shares of all labels) is one row, so that it is drawn
    together.

    Args:
        values: numbers, a row for each unit that is drawn.
        samples: number of resampled sets.
        confidence: of the interval.
        seed: of the draws.

    Raises:
        ValueError: for no rows.
    """
    values = np.asarray(values, float)
    if values.ndim < 1 or not len(values):
        raise ValueError(
            f"bootstrap_interval: values of shape {values.shape}; expected at least one row."
        )
    drawn = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(values[drawn].mean(axis=1), ends, axis=0)
    return values.mean(axis=0), low, high


def paired_bootstrap(
    values: Sequence[float],
    others: Sequence[float],
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean of values - others, low, high): percentile interval over resampled pairs.

    Pairs are drawn with replacement, as many as there are: Koehn, 2004, aclanthology.org/W04-3250, for a
    score that is a mean over texts. The interval is of these texts, not of other training runs.

    Args:
        values: one score of a text each.
        others: scores of another system on the same texts, in the same order.

    Raises:
        ValueError: for different numbers of scores, or none.
    """
    values, others = np.asarray(values, float), np.asarray(others, float)
    if values.shape != others.shape or values.ndim != 1 or not len(values):
        raise ValueError(
            f"paired_bootstrap: {values.shape} and {others.shape} scores; expected two rows of "
            "equal length, at least 1."
        )
    gaps = bootstrap_interval(values - others, samples=samples, confidence=confidence, seed=seed)
    return tuple(map(float, gaps))
