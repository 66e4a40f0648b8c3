"""Drift magnitude, drift time and value gap: how far and how early stances move during training.

"Value Drifts": Bhatia et al., 2025, arxiv.org/abs/2510.26707. The formulas follow the paper's descriptions in
words; they were not compared with the authors' code, which is not public. Intervals are those of
`jaxft.metrics.bootstrap_interval` over the rows of `Stances.per_prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.analysis.stance import StanceClassifier, checked, classified
from jaxft.metrics import bootstrap_interval


class Drift(NamedTuple):
    """The difference of two stance distributions; leading axes are those of the distributions."""

    signed: np.ndarray  # [..., S], M(s) = p_end(s) - p_start(s), which sums to 0
    largest: np.ndarray  # [...], max_s |M(s)|
    total_variation: np.ndarray  # [...], ½ Σ_s |M(s)|


class DriftTime(NamedTuple):
    """When stances arrived at their last values."""

    fraction: np.ndarray  # [T], η in [0, 1]; 0 where nothing moved
    moved: np.ndarray  # [T], whether start and end differ by more than ε


def drift_magnitude(start: Any, end: Any) -> Drift:
    """M(s) = p_end(s | T) - p_start(s | T), with its largest size and the total variation.

    Args:
        start, end: distributions [..., S] over stances, such as [T, S].

    Raises:
        ValueError: for different shapes, or rows that are not distributions.
    """
    start, end = checked(start, "start"), checked(end, "end")
    if start.shape != end.shape:
        raise ValueError(
            f"drift_magnitude: start is {start.shape} and end {end.shape}; expected equal shapes."
        )
    signed = end - start
    return Drift(signed, np.abs(signed).max(axis=-1), np.abs(signed).sum(axis=-1) / 2)


def drift_time(steps: Sequence[int], p: Any, epsilon: Any) -> DriftTime:
    """η: the earliest fraction of the steps after which max_s |p(s | T) - p_end(s | T)| stays within ε.

    A trajectory that leaves the band and returns counts from its last entry. Where start and end differ by at
    most ε, η is 0 and `moved` is False. A larger ε never gives a larger η. With a constant learning rate
    stances wander until the end, and η is large for any run: measure it where the learning rate decays.

    Args:
        steps: [K] steps of the checkpoints; the first is the start of the stage, the last its end.
        p: [K, T, S] distributions at these steps.
        epsilon: ε, one number or [T], such as `half_width` of the last checkpoint.

    Raises:
        ValueError: for fewer than two checkpoints, or steps that do not increase.
    """
    steps, p = np.asarray(steps), checked(p, "p")
    if p.ndim != 3 or len(steps) != len(p) or len(steps) < 2:
        raise ValueError(
            f"drift_time: {len(steps)} steps and p {p.shape}; expected [K, T, S] for K steps, at least two."
        )
    if not np.all(np.diff(steps) > 0):
        raise ValueError(
            f"drift_time: steps must increase without duplicates, got {steps.tolist()}; sort the checkpoints."
        )
    epsilon = np.broadcast_to(np.asarray(epsilon, float), p.shape[1:2])
    if not np.all(epsilon >= 0):
        raise ValueError(f"drift_time: epsilon must be at least 0, got {epsilon.tolist()}.")
    gaps = np.abs(p - p[-1]).max(axis=-1)  # [K, T]
    outside = gaps > epsilon + 1e-9  # decimal fractions such as 0.5 - 0.45 exceed 0.05 by rounding
    entered = len(steps) - np.argmax(outside[::-1], axis=0)
    entered = np.where(outside.any(axis=0), entered, 0)
    fraction = (steps[entered] - steps[0]) / (steps[-1] - steps[0])
    return DriftTime(np.where(outside[0], fraction, 0.0), outside[0])


def half_width(per_prompt: Any, **options: Any) -> float:
    """Largest half width over stances of the bootstrap interval of p(s | T): the ε of `drift_time`.

    Args:
        per_prompt: [P, S], the rows of one topic.
        options: see `bootstrap_interval`.
    """
    _, low, high = bootstrap_interval(per_prompt, **options)
    return float(np.max(high - low) / 2)


def value_gap(
    pairs: Sequence[Mapping[str, Any]], classifier: StanceClassifier
) -> dict[str, np.ndarray]:
    """G(s) [S] of each topic = P(s | chosen, T) - P(s | rejected, T): what a preference set says of stances.

    Args:
        pairs: records with `prompt`, `chosen`, `rejected` and, optionally, `topic`; "all" without it.
        classifier: see `stance_distribution`.

    Raises:
        ValueError: for no pairs, or rows of the classifier that are not distributions.
    """
    if not pairs:
        raise ValueError("value_gap: no pairs.")
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (
        classified(classifier, prompts, [pair[side] for pair in pairs])
        for side in ("chosen", "rejected")
    )
    topics = [pair.get("topic", "all") for pair in pairs]
    rows = lambda topic: [i for i, name in enumerate(topics) if name == topic]
    return {topic: (chosen - rejected)[rows(topic)].mean(axis=0) for topic in dict.fromkeys(topics)}
