"""Win rates and scores at equal length, to separate gains from mere length."""

from __future__ import annotations

import numpy as np


def length_controlled_rate(wins: np.ndarray, length_differences: np.ndarray) -> float:
    """The win rate at equal length: σ(θ) of the fit P(win) = σ(θ + φ tanh(d / std(d))).

    The length part of length-controlled AlpacaEval: Dubois et al., 2024, arxiv.org/abs/2404.04475, section 3,
    with one intercept for all prompts. It is the plain rate if all length differences are equal, or
    all win or all lose.

    Args:
        wins: [N] 1, 0, or 1/2 for a tie.
        length_differences: [N] d, tokens of the scored completion minus those of the other.

    Raises:
        ValueError: for no values, different numbers of values, or wins outside 0..1.
    """
    wins = np.asarray(wins, np.float64)
    lengths = np.asarray(length_differences, np.float64)
    if wins.shape != lengths.shape or wins.ndim != 1 or not len(wins):
        raise ValueError(
            f"length_controlled_rate: {wins.shape} wins and {lengths.shape} length differences; expected "
            "one of each per comparison."
        )
    if not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError("length_controlled_rate: wins must lie in 0..1.")
    spread = lengths.std()
    if spread == 0 or wins.min() == wins.max():
        return float(wins.mean())
    features = np.stack([np.ones_like(wins), np.tanh(lengths / spread)], axis=1)
    # Without a penalty the slope would be infinite if length separates the wins by itself.
    penalty = np.diag([0.0, 1e-3 * len(wins)])
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (p - wins) + penalty @ weights
        hessian = features.T @ (features * (p * (1 - p))[:, None]) + penalty
        # Damped: far from the optimum a full Newton step can overshoot without end.
        step = np.linalg.solve(hessian + 1e-9 * np.eye(2), gradient)
        weights = weights - step / max(1.0, np.abs(step).max())
    return float(1 / (1 + np.exp(-weights[0])))


def standardised_mean(
    values: np.ndarray, lengths: np.ndarray, ref_lengths: np.ndarray
) -> tuple[float, float]:
    """(mean, share): the mean of `values` if their lengths were distributed as `ref_lengths` are.

    Direct standardisation: the mean value at each length, weighted by the reference's share of it.
    Lengths that `values` do not have are left out; `share` is the other lengths' share of the
    reference.

    Args:
        values: [N] scores.
        lengths: [N] tokens of the scored completions.
        ref_lengths: [M] tokens of the reference completions.

    Raises:
        ValueError: for no values, different numbers of values, or if no length is shared.
    """
    values, lengths, ref_lengths = map(np.asarray, (values, lengths, ref_lengths))
    if values.shape != lengths.shape or values.ndim != 1 or not len(values) or not len(ref_lengths):
        raise ValueError(
            f"standardised_mean: {values.shape} values, {lengths.shape} lengths and {ref_lengths.shape} of "
            "the reference; expected one length per value, and at least one of both."
        )
    kinds = np.intersect1d(lengths, ref_lengths)
    if not len(kinds):
        raise ValueError("standardised_mean: no length is among those of the reference.")
    shares = np.array([np.mean(ref_lengths == kind) for kind in kinds])
    means = np.array([values[lengths == kind].mean() for kind in kinds])
    return float(shares @ means / shares.sum()), float(shares.sum())
