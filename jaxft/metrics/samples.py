"""Metrics of several answers to one question."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """1 - C(n - c, k) / C(n, k): probability that one of k answers is right, if c of n >= k are.

    Unbiased for 1 - (1 - p)^k, unlike the same formula with p = c / n: Chen et al., 2021,
    arxiv.org/abs/2107.03374, section 2.1. If p itself is known, use 1 - (1 - p)^k.

    Args:
        correct: c, right answers to each question, any shape.
        samples: n.

    Raises:
        ValueError: for k outside 1..n, or counts outside 0..n.
    """
    correct = np.asarray(correct)
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k must lie in 1..samples ({samples}), got {k}.")
    if ((correct < 0) | (correct > samples)).any():
        raise ValueError(
            f"pass_at_k: counts must lie in 0..samples ({samples}), got {correct.min()} to "
            f"{correct.max()}."
        )
    # C(n - c, k) / C(n, k) = Π_{i = n - c + 1}^{n} (1 - k / i): no large factorial.
    i = np.arange(1, samples + 1)
    factors = np.where(i > samples - correct[..., None], 1.0 - k / i, 1.0)
    return 1.0 - np.prod(np.maximum(factors, 0.0), axis=-1)


def exact_pass_rate(log_probs: np.ndarray, num_samples: int) -> float:
    """pass@N without samples: the mean of 1 - (1 - p)^N, from log p of the one right answer to each problem.

    Raises:
        ValueError: for num_samples below 1.
    """
    if num_samples < 1:
        raise ValueError(f"exact_pass_rate: num_samples must be at least 1, got {num_samples}.")
    p = np.exp(np.asarray(log_probs, np.float64))
    return float(np.mean(-np.expm1(num_samples * np.log1p(-np.minimum(p, 1 - 1e-12)))))


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer, the first in a tie; None counts as no answer, and is returned if all are.

    Self-consistency: Wang et al., 2022, arxiv.org/abs/2203.11171.
    """
    counts: dict[Hashable, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)


def weighted_vote(weights: Sequence[float], answers: Sequence[Hashable | None]) -> Hashable | None:
    """argmax_a Σ_{i: a_i = a} w_i, the first in a tie; skips None, and returns it if all are None.

    With a verifier's values as weights: Li et al., 2023, arxiv.org/abs/2206.02336, eq. 3. Equal weights
    give `majority_vote`.

    Raises:
        ValueError: if weights and answers differ in number.
    """
    if len(weights) != len(answers):
        raise ValueError(f"weighted_vote: {len(weights)} weights for {len(answers)} answers.")
    totals: dict[Hashable, float] = {}
    for weight, answer in zip(weights, answers, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.__getitem__, default=None)


def leader_probability(first: int, second: int) -> float:
    """P(the answer with `first` votes is the likelier of two), after `first` and `second` votes.

    1 - I_½(first + 1, second + 1), the posterior from a uniform prior: Aggarwal et al., 2023,
    arxiv.org/abs/2305.11860, section 3 (the Beta criterion). For integers it is the probability that a
    binomial variable of first + second + 1 fair draws is at most `first`.

    Raises:
        ValueError: for a negative count.
    """
    if min(first, second) < 0:
        raise ValueError(f"leader_probability: counts must be at least 0, got {first}, {second}.")
    draws = first + second + 1
    return sum(math.comb(draws, i) for i in range(first + 1)) / 2**draws


def rerank(scores: Sequence[float], answers: Sequence[Hashable | None]) -> Hashable | None:
    """The answer with the highest score, the first in a tie; skips None, and returns it if all are None."""
    if len(scores) != len(answers):
        raise ValueError(f"rerank: {len(scores)} scores for {len(answers)} answers.")
    known = [(s, a) for s, a in zip(scores, answers, strict=True) if a is not None]
    return max(known, key=lambda pair: pair[0], default=(0.0, None))[1]
