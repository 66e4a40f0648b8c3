"""Metrics of learning several tasks one after another, from the matrix of accuracies."""

from __future__ import annotations

import numpy as np


def average_accuracy(matrix: np.ndarray) -> float:
    """Mean over tasks of the accuracy after the last task: Σ_i a[M, i] / M.

    Args:
        matrix: a [M, M], a[j, i] the accuracy on task i after training on task j; entries above the diagonal
            (tasks not trained yet) are not read and may be NaN.

    Raises:
        ValueError: for a matrix that is not square, or has no number at or below its diagonal.
    """
    return float(_checked(matrix)[-1].mean())


def forgetting_measure(matrix: np.ndarray) -> float:
    """Σ_{i<M} (a[M, i] - a[i, i]) / (M - 1): below 0 where earlier tasks were forgotten.

    The sign is that of Lai et al., 2025, arxiv.org/abs/2507.05386; Chaudhry et al., 2018,
    arxiv.org/abs/1801.10112, report the opposite one, and take the maximum over time instead of a[i, i].

    Raises:
        ValueError: as `average_accuracy`, and for fewer than two tasks.
    """
    matrix = _checked(matrix)
    if len(matrix) < 2:
        raise ValueError("forgetting_measure: needs at least two tasks, got one.")
    return float((matrix[-1] - np.diagonal(matrix))[:-1].mean())


def _checked(matrix):
    matrix = np.asarray(matrix, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"accuracies must be a square matrix [tasks, tasks], got {matrix.shape}.")
    after, task = np.nonzero(np.isnan(np.tril(matrix)))
    if len(after):
        raise ValueError(
            f"accuracies: no number for task {task[0]} after task {after[0]}; measure every task that was "
            "trained after each task."
        )
    return matrix
