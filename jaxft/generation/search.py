"""Best-first search of a tree by the log-probabilities of its branches."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Found(NamedTuple):
    """What a search came to."""

    state: Any | None  # the first right one, or None
    log_prob: float  # of the path to it; -inf without one
    expanded: int  # states whose branches were asked for: calls of the model
    tried: int  # complete states that were verified, the right one included


def best_first_search(
    root: Any,
    expand: Callable[[Any], Iterable[tuple[float, Any]]],
    verdict: Callable[[Any], bool | None],
    *,
    most_expanded: int,
    most_tried: int | None = None,
) -> Found:
    """Follows the likeliest path so far, Σ log p of its branches, until a complete state is right.

    The search of theorem provers: Polu and Sutskever, 2020, arxiv.org/abs/2009.03393, section 4. As no branch
    raises Σ log p, complete states come in the order of their probabilities.

    Args:
        root: the first state.
        expand: (log-probability, child) of each branch of a state; at most 0 each.
        verdict: True or False of a complete state, None of one that can be expanded.
        most_expanded, most_tried: where the search gives up.

    Raises:
        ValueError: for a branch with a log-probability above 0, or one that is no number.
    """
    order = itertools.count()  # of equals the first comes first, and states are never compared
    frontier = [(0.0, next(order), root)]
    expanded = tried = 0
    while frontier and (most_tried is None or tried < most_tried):
        cost, _, state = heapq.heappop(frontier)
        right = verdict(state)
        if right is not None:
            tried += 1
            if right:
                return Found(state, -cost, expanded, tried)
            continue
        if expanded == most_expanded:
            break
        expanded += 1
        for log_prob, child in expand(state):
            if not log_prob <= 0:
                raise ValueError(f"best_first_search: a log-probability of {log_prob}; at most 0.")
            heapq.heappush(frontier, (cost - log_prob, next(order), child))
    return Found(None, float("-inf"), expanded, tried)
