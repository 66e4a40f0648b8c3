"""Searches over whole chains of steps: sampling, verifying, refining, debating, forcing a length.

Each is a search of `jaxft.generation.policies` and returns paths; which of their answers counts is a
vote of `jaxft.metrics`: majority_vote, weighted_vote or rerank (best of N).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import jax
import numpy as np

from jaxft.generation.policies import (
    Judge,
    Path,
    Policy,
    Prefix,
    Propose,
    Search,
    Step,
    Verifier,
    run_searches,
)
from jaxft.metrics import leader_probability

Answer = Callable[[Path], Hashable | None]  # None: no answer can be read
Right = Callable[[Sequence[Path]], Sequence[bool]]


def sample_chains(prompt: Prefix, samples: int, depth: int = 1) -> Search:
    """Samples `samples` independent chains of at most `depth` steps; returns their paths."""
    (steps,) = yield Propose([prompt], samples)
    return (yield from completed([Path(prompt).then(step) for step in steps], depth - 1))


def completed(paths: Sequence[Path], depth: int) -> Search:
    """Samples at most `depth` further steps of each path that has not ended; returns all paths."""
    paths = list(paths)
    for _ in range(depth):
        going = [i for i, path in enumerate(paths) if not path.ended]
        if not going:
            break
        proposals = yield Propose([paths[i].tokens for i in going], 1)
        for i, (step,) in zip(going, proposals, strict=True):
            paths[i] = paths[i].then(step)
    return paths


def judged(paths: Sequence[Path]) -> Search:
    """Appends the verifier's value of the whole path to each path's `values`."""
    found = yield Judge([path.tokens for path in paths])
    return [
        path._replace(values=(*path.values, float(value)))
        for path, value in zip(paths, found, strict=True)
    ]


def judged_chains(prompt: Prefix, samples: int, depth: int = 1) -> Search:
    """Samples chains as `sample_chains` and judges each: for best-of-N and weighted votes.

    Cobbe et al., 2021, arxiv.org/abs/2110.14168; weighted votes: Li et al., 2023, arxiv.org/abs/2206.02336.
    """
    return (yield from judged((yield from sample_chains(prompt, samples, depth))))


def adaptive_consistency(
    prompt: Prefix,
    most: int,
    answer: Answer,
    *,
    block: int = 1,
    threshold: float = 0.95,
    depth: int = 1,
) -> Search:
    """Samples chains in blocks until one answer leads with posterior probability `threshold`.

    The Beta criterion of Aggarwal et al., 2023, arxiv.org/abs/2305.11860: `leader_probability` of the two
    largest counts. At most `most` chains.
    """
    paths = []
    while len(paths) < most:
        size = min(block, most - len(paths))
        paths += yield from sample_chains(prompt, size, depth)
        found = Counter(a for a in map(answer, paths) if a is not None)
        first, second, *_ = *(count for _, count in found.most_common(2)), 0, 0
        if first and leader_probability(first, second) > threshold:
            break
    return paths


def self_refine(
    prompt: Prefix,
    rounds: int,
    *,
    critique: Callable[[Path], Prefix],
    revise: Callable[[Path, Path], Prefix],
    accepts: Callable[[Path, Path], bool],
    depth: int = 1,
) -> Search:
    """A chain that the policy itself criticises and writes again, in at most `rounds` rounds.

    Madaan et al., 2023, arxiv.org/abs/2303.17651. Returns the last chain, in a list.

    Args:
        critique: chain -> the prompt that asks for feedback.
        revise: (chain, feedback) -> the prompt that asks for the next chain.
        accepts: (chain, feedback) -> True if the feedback finds nothing wrong; the search then ends.
    """
    (path,) = yield from sample_chains(prompt, 1, depth)
    for _ in range(rounds):
        (feedback,) = yield from sample_chains(critique(path), 1, depth)
        if accepts(path, feedback):
            break
        (path,) = yield from sample_chains(revise(path, feedback), 1, depth)
    return [path]


def generator_evaluator(
    prompt: Prefix,
    rounds: int,
    threshold: float,
    hint: Callable[[Path], Prefix],
    depth: int = 1,
) -> Search:
    """Samples chains one after another until the verifier's value of one is at least `threshold`.

    Returns all chains with `values`, at most `rounds`, best first. `hint` makes the next prompt of a chain
    that was not accepted.
    """
    found = []
    for _ in range(rounds):
        (path,) = yield from judged_chains(prompt, 1, depth)
        found.append(path)
        if path.values[-1] >= threshold:
            break
        prompt = hint(path)
    return sorted(found, key=lambda path: -path.values[-1])


def debate(
    prompt: Prefix,
    agents: int,
    rounds: int,
    context: Callable[[Sequence[Path], int], Prefix],
    depth: int = 1,
) -> Search:
    """Chains of several agents, each written again in view of the others'; returns those of the last round.

    Du et al., 2023, arxiv.org/abs/2305.14325.

    Args:
        rounds: rounds in all, at least 1; the first is without the others' chains.
        context: (all agents' last chains, number of an agent) -> that agent's next prompt.
    """
    paths = yield from sample_chains(prompt, agents, depth)
    for _ in range(rounds - 1):
        starts = [Path(context(paths, i)) for i in range(agents)]
        paths = yield from completed(starts, depth)
    return paths


def budget_force(
    prompt: Prefix,
    *,
    least: int = 0,
    most: int,
    wait: Prefix = (),
    final: Prefix = (),
    depth: int = 64,
) -> Search:
    """One chain of at least `least` tokens and, apart from its answer, at most `most`.

    s1: Muennighoff et al., 2025, arxiv.org/abs/2501.19393, section 3.1. An end that comes too early is
    replaced by `wait`; after `most` tokens `final` follows, which asks for the answer, and one more step
    is the answer. Tokens that the policy did not sample have no log-probability here.

    Args:
        depth: steps, at most, the answer not included.

    Raises:
        ValueError: if least exceeds most, or is positive without `wait`.
    """
    if least > most or (least and not wait):
        raise ValueError(
            f"budget_force: least ({least}) must be at most most ({most}), and needs tokens in wait."
        )
    path = Path(prompt)
    for _ in range(depth):
        ((step,),) = yield Propose([path.tokens], 1)
        size = len(path.answer) + len(step.tokens)
        if step.ended and size < least:
            # The last token ends the answer.
            step = Step(step.tokens[:-1] + wait, step.log_prob, False)
        path = path.then(step)
        if path.ended:
            return [path]
        if size >= most:
            break
    ((step,),) = yield Propose([path.tokens + final], 1)
    return [path.then(Step(final + step.tokens, step.log_prob, step.ended))]


def rollout_verifier(
    policy: Policy, key: jax.Array, samples: int, right: Right, depth: int = 1
) -> Verifier:
    """Returns a verifier: the fraction of `samples` completions of a prefix that are right.

    Soft labels of a process reward model if `right` knows the answer: Wang et al., 2023,
    arxiv.org/abs/2312.08935, eq. 4; hard labels (eq. 3) are 1 where it is above 0. A search pays nothing for
    these samples in its `Budget`.

    Args:
        key: is used at every call, so that equal calls have equal values.
        right: paths, whose prompts are the prefixes -> whether each has the right answer.
    """

    def values(prefixes):
        searches = [sample_chains(prefix, samples, depth) for prefix in prefixes]
        found = run_searches(searches, policy, key)
        verdicts = right([path for paths, _ in found for path in paths])
        return np.reshape(np.asarray(verdicts, float), (-1, samples)).mean(axis=1).tolist()

    return values
