"""Best-first search against the list of all paths."""

import itertools

import numpy as np
import pytest

from jaxft.generation import best_first_search

DEPTH, BRANCHES = 3, 4


def tree(seed):
    """log p of each branch after each path, and all paths from the likeliest to the least likely."""
    rng, table = np.random.default_rng(seed), {}
    for depth in range(DEPTH):
        for path in itertools.product(range(BRANCHES), repeat=depth):
            logits = 2 * rng.normal(size=BRANCHES)
            table[path] = logits - np.log(np.exp(logits).sum())
    total = lambda path: sum(table[path[:i]][path[i]] for i in range(DEPTH))
    return (
        table,
        sorted(itertools.product(range(BRANCHES), repeat=DEPTH), key=lambda p: -total(p)),
        total,
    )


@pytest.mark.parametrize("rank", [0, 5, 63])
def test_complete_states_come_in_the_order_of_their_probabilities(rank):
    table, paths, total = tree(rank)
    goal, seen = paths[rank], []

    def verdict(path):
        if len(path) < DEPTH:
            return None
        seen.append(path)
        return path == goal

    expand = lambda path: [(table[path][i], (*path, i)) for i in range(BRANCHES)]
    found = best_first_search((), expand, verdict, most_expanded=99)
    assert found.state == goal and found.tried == rank + 1 and seen == paths[: rank + 1]
    assert found.log_prob == pytest.approx(total(goal))
    # It asked for the branches of only those paths that are likelier than the goal.
    partial = lambda path: sum(table[path[:i]][path[i]] for i in range(len(path)))
    assert found.expanded == sum(partial(path) > total(goal) for path in table)
    gave_up = best_first_search((), expand, verdict, most_expanded=99, most_tried=rank)
    assert (gave_up.state, gave_up.tried, gave_up.log_prob) == (None, rank, -np.inf)
    assert best_first_search((), expand, verdict, most_expanded=2)[::2] == (None, 2)


def test_a_log_probability_above_0_is_an_error():
    for value in (0.5, float("nan")):
        with pytest.raises(ValueError, match="log-probability must be at most 0"):
            best_first_search(0, lambda s, v=value: [(v, 1)], lambda s: None, most_expanded=2)
