import numpy as np
import pytest
import scipy.optimize

from jaxft.metrics import length_controlled_rate, standardised_mean


def draw(theta, phi, count=4000):
    rng = np.random.default_rng(0)
    lengths = rng.normal(3.0, 5.0, count)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(lengths / lengths.std())))
    return (rng.random(count) < p).astype(float), lengths


def test_a_gain_that_is_all_length_is_none():
    wins, lengths = draw(0.0, 3.0)
    assert wins.mean() > 0.65
    assert abs(length_controlled_rate(wins, lengths) - 0.5) < 0.04


def test_a_gain_that_is_not_length_stays():
    wins, lengths = draw(1.0, 0.0)
    expected = 1 / (1 + np.exp(-1.0))
    assert abs(length_controlled_rate(wins, lengths) - expected) < 0.03


def test_the_fit_is_scipys():
    wins, lengths = draw(0.5, -2.0, 200)
    wins[0] = 0.5
    x = np.tanh(lengths / lengths.std())

    def loss(w):
        z = w[0] + w[1] * x
        nll = np.sum(np.logaddexp(0, z) - wins * z)
        return nll + 0.5e-3 * len(wins) * w[1] ** 2

    found = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-10).x
    assert abs(length_controlled_rate(wins, lengths) - 1 / (1 + np.exp(-found[0]))) < 1e-5


def test_lengths_that_tell_nothing_leave_the_plain_rate():
    assert length_controlled_rate([1, 0, 1, 1], [2, 2, 2, 2]) == 0.75
    assert length_controlled_rate([1, 1], [3, -4]) == 1.0
    separated = length_controlled_rate([1, 1, 0, 0], [5, 4, -4, -5])
    assert abs(separated - 0.5) < 1e-6


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="one of each per comparison"):
        length_controlled_rate([1, 0], [1])
    with pytest.raises(ValueError, match="must lie in 0..1"):
        length_controlled_rate([2.0], [1])


def test_a_mean_at_the_reference_s_lengths():
    values, lengths = np.array([1.0, 0.0, 0.5, 0.9]), np.array([3, 3, 4, 9])
    # 3 is half of the reference, 4 a quarter; no value has length 5, and 9 is not in the reference.
    mean, share = standardised_mean(values, lengths, np.array([3, 3, 4, 5]))
    assert mean == pytest.approx((0.5 * 0.5 + 0.25 * 0.5) / 0.75) and share == 0.75
    assert standardised_mean(values, lengths, lengths) == (pytest.approx(values.mean()), 1.0)
    with pytest.raises(ValueError, match="no length is among"):
        standardised_mean(values, lengths, np.array([1]))
    with pytest.raises(ValueError, match="one length per value"):
        standardised_mean(values, lengths[:2], lengths)
