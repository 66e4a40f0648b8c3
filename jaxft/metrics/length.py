"""Is a gain mere length? Wins that are compared at equal length."""

from __future__ import annotations

import numpy as np


def length_controlled_rate(wins: np.ndarray, length_differences: np.ndarray) -> float:
    """The win rate at equal length: σ(θ) of the fit P(win) = σ(θ + φ tanh(d / std(d))).

    The length part of length-controlled AlpacaEval: Dubois et al., 2024, arxiv.org/abs/2404.04475, section 3,
    with one intercept for all prompts. Plain rate where all lengths differ alike, or all win or all lose.

    Args:
        wins: [N] 1, 0, or 1/2 for a tie.
        length_differences: [N] d, tokens of the completion that may win less those of the other.

    Raises:
        ValueError: for no or unequally many values, or wins outside 0..1.
    """
    wins = np.asarray(wins, np.float64)
    lengths = np.asarray(length_differences, np.float64)
    if wins.shape != lengths.shape or wins.ndim != 1 or not len(wins):
        raise ValueError(
            f"length_controlled_rate: {wins.shape} wins and {lengths.shape} length differences; expected "
            "one of each a comparison."
        )
    if not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError("length_controlled_rate: wins must lie in 0..1.")
    spread = lengths.std()
    if spread == 0 or wins.min() == wins.max():
        return float(wins.mean())
    features = np.stack([np.ones_like(wins), np.tanh(lengths / spread)], axis=1)
    # Wins that length alone tells apart would send the slope to infinity.
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
