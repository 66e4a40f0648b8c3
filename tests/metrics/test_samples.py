"""pass@k against enumeration, votes against their rules."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxft.metrics import (
    exact_pass_rate,
    leader_probability,
    majority_vote,
    pass_at_k,
    rerank,
    weighted_vote,
)


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


def test_votes_of_one_example_differ():
    answers, scores = [7, 8, 7, 9, 8, 8], [0.9, 0.2, 0.8, 0.95, 0.3, 0.2]
    assert majority_vote(answers) == 8
    assert weighted_vote(scores, answers) == 7  # 1.7; 8 has 0.7 and 9 has 0.95
    assert rerank(scores, answers) == 9
    assert weighted_vote([5.0, *scores], [None, *answers]) == 7
    assert weighted_vote([1.0], [None]) is None
    with pytest.raises(ValueError, match="1 weights for 2 answers"):
        weighted_vote([1.0], [1, 2])


def test_equal_weights_are_a_majority():
    rng = np.random.default_rng(0)
    for _ in range(200):
        answers = [None if a == 0 else int(a) for a in rng.integers(0, 5, rng.integers(1, 9))]
        assert weighted_vote([0.25] * len(answers), answers) == majority_vote(answers)
        assert majority_vote(answers[:1]) == rerank([0.1], answers[:1]) == answers[0]


@pytest.mark.parametrize("p", [0.6, 0.4])
def test_a_majority_helps_only_if_the_right_answer_is_the_mode(p):
    known = {1: 0.6, 3: 0.648, 5: 0.6826, 11: 0.7535, 33: 0.8789}
    for n in (1, 3, 5, 11):
        right = 0.0
        for votes in itertools.product((0, 1), repeat=n):
            chance = p ** sum(votes) * (1 - p) ** (n - sum(votes))
            right += chance * (majority_vote(votes) == 1)
        assert right == pytest.approx(known[n] if p > 0.5 else 1 - known[n], abs=5e-5)
    assert stats.binom.sf(16, 33, p) == pytest.approx(known[33] if p > 0.5 else 0.1211, abs=5e-5)


def test_the_leader_s_probability_is_that_of_a_beta_distribution():
    for first in range(12):
        for second in range(12):
            found = leader_probability(first, second)
            assert found == pytest.approx(stats.beta.sf(0.5, first + 1, second + 1), abs=1e-12)
            assert found + leader_probability(second, first) == pytest.approx(1)
    with pytest.raises(ValueError, match="counts must be at least 0"):
        leader_probability(-1, 0)


def test_pass_at_k_of_three_right_answers_in_ten():
    for k, value in ((1, 0.3), (2, 0.5333), (5, 0.9167), (8, 1.0)):
        assert pass_at_k(np.array(3), 10, k) == pytest.approx(value, abs=5e-5)
    with pytest.raises(ValueError, match="k must lie in 1..samples"):
        pass_at_k(np.array(3), 10, 11)
