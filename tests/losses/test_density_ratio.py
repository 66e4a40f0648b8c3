"""Density ratios: against scikit-learn, and two Gaussians whose ratio is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxft.losses import density_ratios, logistic_regression


@pytest.mark.parametrize("shift, strength", [(0.5, 1.0), (3.0, 0.1), (40.0, 1.0)])
def test_the_regression_is_scikit_learns(shift, strength):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3 == 0
    x = rng.normal(size=(60, 4)) + shift * labels[:, None]
    sklearn = LogisticRegression(C=strength, class_weight="balanced", tol=1e-10, max_iter=10_000)
    expected = sklearn.fit(x, labels)
    weights, bias = logistic_regression(x, labels, strength)
    np.testing.assert_allclose(weights, expected.coef_[0], rtol=1e-3, atol=1e-5)
    assert bias == pytest.approx(expected.intercept_[0], rel=1e-3, abs=1e-5)


def test_ratios_of_two_gaussians_are_theirs():
    """N(m, 1) over N(-m, 1) is exp(2 m x); that there are more bad prompts does not matter."""
    rng = np.random.default_rng(1)
    labels = np.arange(8000) < 2000
    x = rng.normal(size=(8000, 1)) + np.where(labels, 0.4, -0.4)[:, None]
    ratios = density_ratios(x, labels, minimum=0.0, maximum=np.inf, fitted=8000)
    inner = np.abs(x[:, 0]) < 2
    assert np.abs(np.log(ratios[inner]) - 0.8 * x[inner, 0]).max() < 0.25
    clipped = density_ratios(x, labels, fitted=8000)
    np.testing.assert_array_equal(clipped, np.clip(ratios, 0.5, 10))
    # Weighted by their ratios, bad prompts lie where good ones do.
    weight = ratios[~labels] / ratios[~labels].sum()
    assert weight @ x[~labels, 0] == pytest.approx(x[labels, 0].mean(), abs=0.15)


def test_mistakes_are_explained():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="got 3 good and 0 bad ones"):
        density_ratios(x, np.ones(3, bool))
    with pytest.raises(ValueError, match="minimum 2.0 and maximum 1.0"):
        density_ratios(x, np.arange(3) > 0, minimum=2.0, maximum=1.0)
