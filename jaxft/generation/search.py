"""Best-first search of a tree by the log-probabilities of its branches."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Found(NamedTuple):
    """Result of a search."""

    state: Any | None  # the first correct complete state, or None
    log_prob: float  # log-probability of the path to it; -inf if there is none
    expanded: int  # number of expanded states, each a call of the model
    tried: int  # number of complete states verified, the correct one included


def best_first_search(
    root: Any,
    expand: Callable[[Any], Iterable[tuple[float, Any]]],
    verdict: Callable[[Any], bool | None],
    *,
    most_expanded: int,
    most_tried: int | None = None,
) -> Found:
    """Expands the likeliest path so far, by Σ log p of its branches, until a complete state is correct.

    The search of theorem provers: Polu and Sutskever, 2020, arxiv.org/abs/2009.03393, section 4. Because no
    branch raises Σ log p, complete states are found in descending order of probability.

    Args:
        root: the first state.
        expand: state -> (log-probability, child) of each branch; log-probabilities must be at most 0.
        verdict: state -> True or False for a complete state, None for one that can be expanded.
        most_expanded, most_tried: limits at which the search stops.

    Raises:
        ValueError: if a branch's log-probability is above 0 or NaN.
    """
    order = itertools.count()  # breaks ties first-in first-out, so states are never compared
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
                raise ValueError(
                    f"best_first_search: log-probability must be at most 0, got {log_prob}."
                )
            heapq.heappush(frontier, (cost - log_prob, next(order), child))
    return Found(None, float("-inf"), expanded, tried)
