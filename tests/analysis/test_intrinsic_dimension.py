"""The search on functions whose crossing is known."""

import pytest

from jaxft.analysis import d90_search, satisfactory


def step(at, calls=None):
    """Scores 1 from d = at on, else 0, for every seed."""

    def train(d, seeds):
        if calls is not None:
            calls.append(d)
        return [float(d >= at)] * len(seeds)

    return train


@pytest.mark.parametrize("at", [3, 11, 16, 37, 99, 100])
def test_finds_the_crossing(at):
    found = d90_search(step(at), [2, 4, 10, 32, 100, 1000], 0.9, [0, 1, 2], resolution=1.0001)
    assert (found.d, found.failing) == (at, at - 1)


def test_bisects_in_the_logarithm_and_stops_at_the_resolution():
    calls = []
    found = d90_search(step(150, calls), [10, 1000], 0.9, [0], resolution=2.0)
    assert calls == [10, 1000, 100, 316, 178]  # geometric means
    assert (found.failing, found.d) == (100, 178) and list(found.scores) == calls


def test_two_of_three_seeds():
    scores = {4: [0.9, 0.5, 0.5], 8: [0.9, 0.9, 0.1], 16: [1.0, 1.0, 1.0]}
    found = d90_search(lambda d, seeds: scores.get(d, [0, 0, 0]), [4, 8, 16], 0.9, [0, 1, 2])
    assert found.d == 8
    strict = d90_search(
        lambda d, seeds: scores.get(d, [0] * 3), [4, 8, 16], 0.9, [0, 1, 2], agreement=1.0
    )
    assert strict.d == 16


def test_ends_of_the_grid():
    assert d90_search(step(1), [5, 10], 0.9, [0])[:2] == (5, None)
    assert d90_search(step(11), [5, 10], 0.9, [0])[:2] == (None, None)


def test_satisfactory():
    assert satisfactory(0.8) == pytest.approx(0.72)
    assert satisfactory(0.8, floor=0.5) == pytest.approx(0.77)
    assert satisfactory(1.0, share=0.5, floor=0.5) == 0.75


@pytest.mark.parametrize("grid, seeds, match", [
    ([], [0], "grid must increase"), ([2, 2], [0], "grid must increase"),
    ([0, 2], [0], "grid must increase"), ([1], [], "needs seeds"),
])  # fmt: skip
def test_bad_arguments(grid, seeds, match):
    with pytest.raises(ValueError, match=match):
        d90_search(step(1), grid, 0.9, seeds)
    with pytest.raises(ValueError, match="gave 1 scores for 2 seeds"):
        d90_search(lambda d, seeds: [1.0], [1], 0.9, [0, 1])
