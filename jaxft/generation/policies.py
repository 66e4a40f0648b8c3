"""One protocol for all searches over reasoning steps: requests to a policy and a verifier.

A search is a generator. It yields requests, `Propose` or `Judge`, receives their answers, and returns its
result. It knows no model, so that a test answers from a table, and many searches run together: their
requests are answered in one batch.

    def best_of_two(prompt):
        (steps,) = yield Propose([prompt], 2)
        values = yield Judge([prompt + step.tokens for step in steps])
        return max(zip(values, steps))[1]

    policy = decoder_policy(model, params, config, end_ids=(2,))
    results = run_searches([best_of_two(prompt) for prompt in prompts], policy, key, verifier)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jaxft.generation.budget import Budget, attended
from jaxft.generation.decoding import SamplingConfig
from jaxft.generation.sampler import generate
from jaxft.keys import stream

Prefix = tuple[Hashable, ...]  # token ids, of the prompt and what follows it


class Step(NamedTuple):
    """Addition of a policy to a prefix."""

    tokens: Prefix  # at least one
    log_prob: float  # nats, the sum over its tokens
    ended: bool  # True if the answer is complete


class Propose(NamedTuple):
    """Request for `samples` steps after each prefix; the answer is a list of steps for each."""

    prefixes: Sequence[Prefix]
    samples: int


class Judge(NamedTuple):
    """Request for the verifier's value of each prefix, in [0, 1]."""

    prefixes: Sequence[Prefix]


class Path(NamedTuple):
    """A prompt and the steps that a search chose after it."""

    prompt: Prefix
    steps: tuple[Prefix, ...] = ()
    log_prob: float = 0.0  # nats, of all steps
    ended: bool = False
    values: tuple[float, ...] = ()  # the verifier's values, if the search asked for them

    @property
    def answer(self) -> Prefix:
        """The tokens of all steps."""
        return tuple(itertools.chain(*self.steps))

    @property
    def tokens(self) -> Prefix:
        """The tokens of prompt and steps."""
        return self.prompt + self.answer

    @property
    def mean_log_prob(self) -> float:
        """Nats per token of the steps; 0 without a step."""
        return self.log_prob / max(1, len(self.answer))

    def then(self, step: Step) -> Path:
        """Returns the path with one more step."""
        steps = (*self.steps, step.tokens)
        return self._replace(steps=steps, log_prob=self.log_prob + step.log_prob, ended=step.ended)


# (key, prefixes, samples) -> steps of each prefix
Policy = Callable[[jax.Array, Sequence[Prefix], int], Sequence[Sequence[Step]]]
Verifier = Callable[[Sequence[Prefix]], Sequence[float]]
Search = Generator[Propose | Judge, Any, Any]


def run_searches(
    searches: Iterable[Search], policy: Policy, key: jax.Array, verifier: Verifier | None = None
) -> list[tuple[Any, Budget]]:
    """Returns (result, `Budget`) of each search; requests of all searches are answered together.

    Args:
        policy: is called with a key of its own each time.
        verifier: only needed if a search has a `Judge`.

    Raises:
        ValueError: for an answer of another length than its request, or a `Judge` without a verifier.
    """
    search, answer = together([metered(search) for search in searches]), None
    for turn in itertools.count():
        try:
            request = search.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(request, Propose):
            answer = policy(stream(key, "proposal", turn), request.prefixes, request.samples)
            sizes = {len(steps) for steps in answer} - {request.samples}
        elif verifier is None:
            raise ValueError("run_searches: the search asks for values; pass a verifier.")
        else:
            answer, sizes = list(verifier(request.prefixes)), set()
        if len(answer) != len(request.prefixes) or sizes:
            raise ValueError(
                f"run_searches: {len(request.prefixes)} prefixes have {len(answer)} answers, or not the "
                "number of steps that was asked for; the policy or the verifier must answer each."
            )


def together(searches: Sequence[Search]) -> Search:
    """A search that runs others in lockstep and returns the list of their results.

    Requests of one kind, and with as many samples, become one request.
    """
    results, waiting = [None] * len(searches), {}

    def advance(i, answer):
        try:
            waiting[i] = searches[i].send(answer)
        except StopIteration as end:
            results[i] = end.value

    for i in range(len(searches)):
        advance(i, None)
    while waiting:
        asked, groups = dict(waiting), {}
        waiting.clear()
        for i, request in asked.items():
            groups.setdefault((type(request), *request[1:]), []).append(i)
        for (kind, *rest), members in groups.items():
            found = yield kind([p for i in members for p in asked[i].prefixes], *rest)
            found = iter(found)
            for i in members:
                advance(i, list(itertools.islice(found, len(asked[i].prefixes))))
    return results


def metered(search: Search) -> Search:
    """The same search, which returns (its result, its `Budget`)."""
    known, verified, budget, answer = {}, {}, Budget(), None
    while True:
        try:
            request = search.send(answer)
        except StopIteration as end:
            return end.value, budget
        began = time.perf_counter()
        answer = yield request
        budget += Budget(seconds=time.perf_counter() - began)
        if isinstance(request, Propose):
            budget += _proposed(known, request.prefixes, answer)
        else:
            budget += _judged(verified, request.prefixes)


def decoder_policy(
    model: Any,
    params: Any,
    config: SamplingConfig,
    end_ids: Sequence[int],
    sampler: Callable[..., Any] = generate,
) -> Policy:
    """Returns the policy of a decoder: a step ends at one of `config.stop_ids`, an answer at `end_ids`.

    With stop_ids equal to end_ids a step is a whole answer. A step that max_new_tokens cuts ends
    no answer.

    Args:
        sampler: has the arguments and the result of `generate`.

    Raises:
        ValueError: if an end id does not end a step.
    """
    if missing := set(end_ids) - set(config.stop_ids):
        raise ValueError(
            f"decoder_policy: end_ids {sorted(missing)} are not in config.stop_ids; add them."
        )

    def propose(key, prefixes, samples):
        out = sampler(model, params, prefixes, key, config, samples=samples)
        totals = out.log_probs.sum(axis=1)
        steps = [
            Step(tuple(ids), float(total), ids[-1] in end_ids)
            for ids, total in zip(out.completions, totals, strict=True)
        ]
        return [steps[i : i + samples] for i in range(0, len(steps), samples)]

    return propose


def _proposed(known, prefixes, answer):
    """Adds the prefixes and their steps to the cache; returns what they cost."""
    total = Budget()
    for prefix, steps in zip(prefixes, answer, strict=True):
        size, new = len(prefix), _grow(known, prefix)
        total += Budget(prompt=new, cached=size - new, attended=attended(size - new, size))
        for step in steps:
            _grow(known, prefix + step.tokens)
            length = len(step.tokens)
            total += Budget(generated=length, attended=attended(size, size + length))
    longest = max((len(step.tokens) for steps in answer for step in steps), default=0)
    return total + Budget(passes=longest)


def _judged(known, prefixes):
    total = Budget(passes=1)
    for prefix in prefixes:
        size, new = len(prefix), _grow(known, prefix)
        total += Budget(verified=new, verified_attended=attended(size - new, size))
    return total


def _grow(trie, tokens):
    """Adds the tokens to a trie of dicts; returns how many of them it did not have."""
    new = 0
    for token in tokens:
        new += token not in trie
        trie = trie.setdefault(token, {})
    return new
