"""pass@k against enumeration, votes against their rules."""

import itertools

import numpy as np
import pytest

from jaxft.metrics import exact_pass_rate, majority_vote, pass_at_k


@pytest.mark.parametrize("samples, k", [(5, 1), (5, 3), (5, 5), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, k):
    for correct in range(samples + 1):
        answers = [i < correct for i in range(samples)]
        subsets = [any(chosen) for chosen in itertools.combinations(answers, k)]
        np.testing.assert_allclose(pass_at_k(correct, samples, k), np.mean(subsets), atol=1e-12)


def test_exact_pass_rate_is_the_chance_of_one_right_sample():
    # Right on half the problems for sure, or with 1 in 10 on all: DCO's example.
    half, tenth = np.array([0.0, -np.inf]), np.log(np.full(2, 0.1))
    assert [round(exact_pass_rate(half, n), 6) for n in (1, 16, 64)] == [0.5] * 3
    found = [exact_pass_rate(tenth, n) for n in (1, 16, 64)]
    np.testing.assert_allclose(found, [0.1, 0.815, 0.999], atol=5e-4)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        exact_pass_rate(tenth, 0)


def test_pass_at_k_takes_any_shape_and_large_counts():
    counts = np.array([[0, 1], [500, 1000]])
    got = pass_at_k(counts, 1000, 500)
    assert got.shape == (2, 2) and got[0, 0] == 0 and got[1, 1] == 1
    np.testing.assert_allclose(got[0, 1], 0.5)


def test_pass_at_k_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"k must lie in 1..samples \(4\), got 5"):
        pass_at_k(2, 4, 5)
    with pytest.raises(ValueError, match="counts must lie in"):
        pass_at_k(np.array([2, 5]), 4, 1)


@pytest.mark.parametrize(
    "answers, vote",
    [(["a", "b", "b"], "b"), (["b", "a"], "b"), ([None, None, 3], 3), ([None], None), ([], None)],
)
def test_majority_vote(answers, vote):
    assert majority_vote(answers) == vote
