"""Average accuracy and forgetting, by worked numbers."""

import numpy as np
import pytest

from jaxft.metrics import average_accuracy, forgetting_measure

NAN = np.nan


def test_worked_numbers():
    matrix = [[0.8, NAN], [0.6, 0.9]]
    assert forgetting_measure(matrix) == pytest.approx(-0.2)
    assert average_accuracy(matrix) == pytest.approx(0.75)
    better = [[0.5, NAN, NAN], [0.6, 0.4, NAN], [0.7, 0.5, 0.9]]
    assert forgetting_measure(better) == pytest.approx((0.2 + 0.1) / 2)


def test_accuracies_before_a_task_are_not_read():
    matrix = np.random.default_rng(0).random((4, 4))
    lower = np.where(np.tri(4) > 0, matrix, NAN)
    assert forgetting_measure(matrix) == forgetting_measure(lower)
    assert forgetting_measure(matrix) == pytest.approx(
        np.mean([matrix[3, i] - matrix[i, i] for i in range(3)])
    )


@pytest.mark.parametrize(
    "matrix", [[[0.5, 0.5]], [0.5], [], [[0.5, NAN], [NAN, 0.5]], [[NAN, NAN], [0.5, 0.5]]]
)
def test_bad_matrices_are_refused(matrix):
    for measure in (average_accuracy, forgetting_measure):
        with pytest.raises(ValueError, match="accuracies"):
            measure(matrix)
    with pytest.raises(ValueError, match="two tasks"):
        forgetting_measure([[0.5]])
