"""Scores of predicted distributions over a few answers: log-likelihood, Brier score, calibration error."""

from __future__ import annotations

from typing import Any

import numpy as np

TINY = 1e-12  # probabilities are clipped here, so that a certain and wrong prediction stays finite


def nll(probs: Any, labels: Any) -> np.ndarray:
    """-log p(label) [...] in nats of each prediction; p is clipped at 1e-12.

    Args:
        probs: [..., A], probabilities of the answers.
        labels: [...] integers, the true answers.

    Raises:
        ValueError: if the shapes do not fit, or a row of probs is not a distribution.
    """
    probs, labels = _checked(probs, labels, "nll")
    return -np.log(np.maximum(_true(probs, labels), TINY))


def brier(probs: Any, labels: Any) -> np.ndarray:
    """Σ_a (p_a - 1{a = label})² [...], from 0 to 2.

    Brier, 1950, doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2, eq. 2 without the mean. With two
    answers it is twice the square that is also in use.

    Args, Raises: see `nll`.
    """
    probs, labels = _checked(probs, labels, "brier")
    return np.sum(probs**2, axis=-1) - 2 * _true(probs, labels) + 1


def ece(probs: Any, labels: Any, bins: int = 10) -> float:
    """Σ_b |B_b| / N |accuracy(B_b) - confidence(B_b)|: the expected calibration error, 0 to 1.

    Guo et al., 2017, arxiv.org/abs/1706.04599, eq. 3. A prediction's confidence is its largest probability;
    bins of equal width divide 0..1, and a confidence on an edge is in the lower bin. The estimate
    is biased upwards for few predictions: also a calibrated model has an error above 0.

    Args:
        bins: number of bins.
        probs, labels: see `nll`.

    Raises:
        ValueError: see `nll`; also for no predictions, or bins below 1.
    """
    probs, labels = _checked(probs, labels, "ece")
    if bins < 1 or labels.size == 0:
        raise ValueError(
            f"ece: {labels.size} predictions in {bins} bins; expected at least 1 of each."
        )
    confidence = probs.max(axis=-1).ravel()
    right = (probs.argmax(axis=-1) == labels).ravel()
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / labels.size)


def _true(probs, labels):
    return np.take_along_axis(probs, labels[..., None], axis=-1)[..., 0]


def _checked(probs, labels, name):
    probs, labels = np.asarray(probs, float), np.asarray(labels)
    if probs.ndim < 1 or probs.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name}: probs {probs.shape} and labels {labels.shape}; expected [..., A] and [...]."
        )
    if labels.size and not (0 <= labels.min() and labels.max() < probs.shape[-1]):
        raise ValueError(
            f"{name}: labels from {labels.min()} to {labels.max()} for {probs.shape[-1]} answers; expected 0 "
            "to one less than their number."
        )
    if not np.allclose(probs.sum(axis=-1), 1, atol=1e-3) or (probs < 0).any():
        raise ValueError(f"{name}: probs are not distributions over the last axis; normalise them.")
    return probs, labels
