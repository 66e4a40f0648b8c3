"""Confidence intervals."""

from __future__ import annotations

import math


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
