"""Searches of a tree: best first by log-probabilities, and over reasoning steps by a verifier's values.

The latter are searches of `jaxft.generation.policies`: generators that `run_searches` runs.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.generation.chains import completed, judged
from jaxft.generation.policies import Path, Prefix, Propose, Search, together


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


def step_beam_search(
    prompt: Prefix,
    beams: int,
    width: int,
    depth: int,
    aggregate: Callable[[Sequence[float]], float] = lambda values: values[-1],
) -> Search:
    """Samples `beams` first steps; then keeps the best beams / width paths and samples `width` steps of each.

    Snell et al., 2024, arxiv.org/abs/2408.03314, section 5.1. A path that ends leaves the beam. Equal
    paths count once. With beams = width and depth 1 this is best-of-N over one step; a breadth-first
    tree of thoughts (Yao et al., 2023, arxiv.org/abs/2305.10601) with b thoughts and k proposals has
    beams = b k and width = k.

    Args:
        depth: steps of a path, at most.
        aggregate: value of a path from its steps' values: the last, min, math.prod, statistics.fmean.

    Returns:
        Paths that ended, with `values`, best first; those of the last beam if none did.

    Raises:
        ValueError: if width does not divide beams, or depth is below 1.
    """
    if width < 1 or beams % width or beams < width or depth < 1:
        raise ValueError(
            "step_beam_search: beams must be a positive multiple of width, and depth at least 1; got "
            f"{beams}, {width} and {depth}."
        )
    ended, kept, samples = [], [Path(prompt)], beams
    order = lambda paths: sorted(paths, key=lambda path: -aggregate(path.values))
    for _ in range(depth):
        proposals = yield Propose([path.tokens for path in kept], samples)
        grown = [
            path.then(step) for path, steps in zip(kept, proposals, strict=True) for step in steps
        ]
        paths = yield from judged(list({path.steps: path for path in grown}.values()))
        ended += [path for path in paths if path.ended]
        kept = order(path for path in paths if not path.ended)[: beams // width]
        samples = width
        if not kept:
            break
    return order(ended or kept)


def diverse_tree_search(
    prompt: Prefix,
    beams: int,
    width: int,
    depth: int,
    aggregate: Callable[[Sequence[float]], float] = lambda values: values[-1],
) -> Search:
    """Runs beams / width separate trees, each with one path that continues with the best of `width` steps.

    Diverse verifier tree search: Beeching et al., 2024, "Scaling test-time compute with open models",
    huggingface.co/spaces/HuggingFaceH4/blogpost-scaling-test-time-compute. Returns each tree's best path.

    Raises:
        ValueError: as `step_beam_search`.
    """
    if width < 1 or beams % width or beams < width:
        raise ValueError(
            f"diverse_tree_search: beams must be a positive multiple of width, got {beams} and {width}."
        )
    tree = lambda: step_beam_search(prompt, width, width, depth, aggregate)
    trees = yield from together([tree() for _ in range(beams // width)])
    return [paths[0] for paths in trees]


@dataclasses.dataclass
class Node:
    """A prefix in a tree of `mcts`."""

    path: Path
    prior: float = 1.0
    visits: int = 0
    total: float = 0.0  # sum of the values that were backed up
    children: list[Node] = dataclasses.field(default_factory=list)


def puct(
    values: Sequence[float], visits: Sequence[int], priors: Sequence[float], c: float
) -> np.ndarray:
    """Q + c P sqrt(Σ_b N_b) / (1 + N) of each child.

    Silver et al., 2017, doi.org/10.1038/nature24270, "Search algorithm".
    """
    visits = np.asarray(visits, float)
    bonus = c * np.asarray(priors, float) * math.sqrt(visits.sum()) / (1 + visits)
    return np.asarray(values, float) + bonus


def mcts(prompt: Prefix, simulations: int, width: int, depth: int, c: float = 1.25) -> Search:
    """Monte Carlo tree search over steps: select by `puct`, expand, evaluate, back up means.

    A node is a prefix, its children are the distinct ones of `width` sampled steps, and its prior among
    them is the softmax of their log-probabilities per token. A leaf's value is the verifier's; with
    `rollout_verifier` it is the fraction of right rollouts. The value of a child without visits is
    its parent's mean (AlphaZero: 0).

    Args:
        simulations: leaves that are evaluated, at least 1; those that ended may be visited again.
        depth: steps of a path, at most.

    Returns:
        Paths that ended, the most visited first. The first is the path of most visits from the root,
        completed by single samples if it has not ended.

    Raises:
        ValueError: for sizes below 1.
    """
    if min(simulations, width, depth) < 1:
        raise ValueError(
            f"mcts: simulations, width and depth must be at least 1, got {simulations}, {width}, {depth}."
        )
    root = Node(Path(prompt))
    yield from _expand(root, width)
    for _ in range(simulations):
        trail = [root]
        while trail[-1].children:
            trail.append(_selected(trail[-1], c))
        leaf = trail[-1]
        if _unjudged(leaf.path):
            (leaf.path,) = yield from judged([leaf.path])
            if not leaf.path.ended and len(leaf.path.steps) < depth:
                yield from _expand(leaf, width)
        for node in trail:
            node.visits += 1
            node.total += leaf.path.values[-1]
    return (yield from _answers(root, depth))


def _expand(node, width):
    (steps,) = yield Propose([node.path.tokens], width)
    steps = list({step.tokens: step for step in steps}.values())
    means = np.array([step.log_prob / len(step.tokens) for step in steps])
    priors = np.exp(means - means.max())
    # In order of the priors, so that the likeliest is the first of those without visits.
    for i in np.argsort(-priors, kind="stable"):
        node.children.append(Node(node.path.then(steps[i]), float(priors[i] / priors.sum())))


def _unjudged(path):
    return len(path.values) < len(path.steps)


def _selected(node, c):
    own = node.total / node.visits if node.visits else 0.0
    values = [child.total / child.visits if child.visits else own for child in node.children]
    visits, priors = zip(*((child.visits, child.prior) for child in node.children), strict=True)
    return node.children[int(np.argmax(puct(values, visits, priors, c)))]


def _answers(root, depth):
    most, nodes, found = root, [root], []
    while most.children:
        most = max(most.children, key=lambda child: child.visits)
    for node in nodes:  # grows while it is read
        nodes += node.children
        if node.path.ended and node.visits and node is not most:
            found.append(node)
    (first,) = yield from completed([most.path], depth - len(most.path.steps))
    if _unjudged(first):
        (first,) = yield from judged([first])
    found.sort(key=lambda node: -node.visits)
    return [first, *(node.path for node in found)]
