"""Scores of predicted distributions against scikit-learn, plain loops and worked numbers."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from jaxft.metrics import brier, ece, nll


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(3), (4, 25)), rng.integers(0, 3, (4, 25))


def test_nll_and_brier_are_those_of_scikit_learn(predictions):
    probs, labels = predictions
    expected = log_loss(labels.ravel(), probs.reshape(-1, 3), labels=range(3))
    np.testing.assert_allclose(nll(probs, labels).mean(), expected)
    two = probs[..., :2] / probs[..., :2].sum(axis=-1, keepdims=True)
    yes = labels == 1
    expected = brier_score_loss(yes.ravel(), two[..., 1].ravel())
    np.testing.assert_allclose(brier(two, yes.astype(int)).mean(), 2 * expected)
    np.testing.assert_allclose(
        brier(probs, labels), ((probs - np.eye(3)[labels]) ** 2).sum(axis=-1)
    )


def test_ece_is_the_plain_loop_s(predictions):
    probs, labels = predictions
    total, rows = 0.0, list(zip(probs.reshape(-1, 3), labels.ravel(), strict=True))
    for b in range(7):
        inside = [(p, y) for p, y in rows if b / 7 < p.max() <= (b + 1) / 7]
        if inside:
            accuracy = np.mean([p.argmax() == y for p, y in inside])
            confidence = np.mean([p.max() for p, _ in inside])
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    np.testing.assert_allclose(ece(probs, labels, 7), total)


def test_worked_numbers():
    probs, labels = [[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [1.0, 0.0]], [0, 1, 1, 1]
    np.testing.assert_allclose(nll(probs, labels)[:3], -np.log([0.8, 0.2, 0.4]))
    assert nll(probs, labels)[3] == pytest.approx(-np.log(1e-12))  # clipped, not infinite
    np.testing.assert_allclose(brier(probs, labels), [0.08, 1.28, 0.72, 2.0])
    # Bins (0.5, 0.6], (0.7, 0.8] and (0.9, 1]: (0.6 + 2 * 0.3 + 1) / 4
    assert ece(probs, labels) == pytest.approx(0.55)
    assert ece([[0.0, 1.0]], [1]) == 0


@pytest.mark.parametrize("score", [nll, brier, ece])
@pytest.mark.parametrize(
    "probs, labels, message",
    [
        ([[0.5, 0.5]], [0, 1], "expected"),
        ([[0.5, 0.5]], [2], "labels from 2 to 2"),
        ([[0.5, 0.5]], [-1], "labels from -1"),
        ([[0.5, 0.4]], [0], "not distributions"),
        ([[1.5, -0.5]], [0], "not distributions"),
    ],
)
def test_bad_input_is_one_line(score, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        score(probs, labels)


def test_ece_needs_predictions_and_bins():
    for probs, labels, bins in ((np.zeros((0, 2)), np.zeros(0, int), 10), ([[0.5, 0.5]], [0], 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            ece(probs, labels, bins)
