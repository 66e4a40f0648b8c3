"""Choosing the question whose answer says most about other answers: expected information gain.

Wang et al., 2025, arxiv.org/abs/2504.04204: no prior of the entity (a respondent, a student, an object) is
modelled; uncertainty about it is uncertainty about its answers, under a model that was trained on the answers
of others. All functions know the model only as a `ProbsFn`. Rows are episodes: N of them take a turn at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxft.keys import stream

EMPTY = -1  # question and answer of an empty place of a history; an answer that is not known
TINY = 1e-12  # 0 log 0 = 0

# probs_fn(history [N, L, 2], questions [N, Q]) -> [N, Q, A]: the distribution of the answers to each question
# given a history of (question, answer), which is filled from the front and then EMPTY.
ProbsFn = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Turn(NamedTuple):
    """All that a policy may know: nothing about answers that were not given yet."""

    history: np.ndarray  # [N, L, 2] of (question, answer)
    candidates: np.ndarray  # [N, C] questions of the pool
    targets: np.ndarray  # [N, T] questions whose answers are to be predicted
    available: np.ndarray  # [N, C] bool, False for candidates that were asked
    remaining: int  # questions that may still be asked


# (turn, key) -> scores [N, C] of the candidates; the highest is asked
Policy = Callable[[Turn, jax.Array], np.ndarray]


class Trace(NamedTuple):
    """The record of R rounds."""

    turns: list[Turn]  # R + 1: before each question, and after the last
    probs: np.ndarray  # [R + 1, N, T, A] of the targets at each turn
    scores: np.ndarray  # [R, N, C] the policy's
    choices: np.ndarray  # [R, N] places of the asked questions among the candidates


def entropy(probs: np.ndarray) -> np.ndarray:
    """-Σ_a p_a log p_a [...] in nats of distributions [..., A]."""
    return -np.sum(probs * np.log(np.maximum(probs, TINY)), axis=-1)


def expected_information_gain(
    probs_fn: ProbsFn, history: np.ndarray, candidates: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """EIG(x | h) = H(h) - Σ_a p(a | h, x) H(h ⊕ (x, a)) [N, C] in nats, H(h) = mean_z H[p(. | h, z)].

    The mean over targets of the mutual information, under the model, between the answers to a candidate x and
    to a target z. For a model that is not Bayesian it may be slightly negative. Entropies in the authors'
    release become NaN at probability 0; here 0 log 0 = 0.

    Args:
        history: [N, L, 2] with at least one empty place in each row.
        candidates: [N, C].
        targets: [N, T].
    """
    rows, pool = candidates.shape
    asked = probs_fn(history, np.concatenate([targets, candidates], axis=1))
    before, chances = np.split(asked, [targets.shape[1]], axis=1)
    kinds = chances.shape[-1]
    # Each candidate with each of its answers: [N C A, L, 2].
    copies = lambda x: np.repeat(x, pool * kinds, axis=0)
    simulated = with_answers(
        copies(history),
        np.repeat(candidates.ravel(), kinds),
        np.tile(np.arange(kinds), rows * pool),
    )
    after = entropy(probs_fn(simulated, copies(targets))).mean(axis=1)
    after = after.reshape(rows, pool, kinds)
    return entropy(before).mean(axis=1)[:, None] - np.sum(chances * after, axis=-1)


def rollout_value(
    probs_fn: ProbsFn, turn: Turn, key: jax.Array, *, depth: int, samples: int = 1
) -> np.ndarray:
    """V(x) = EIG(x | h) + mean over samples of Σ_{d=1..depth} max_x' EIG(x' | h_d) [N, C] in nats.

    h_d appends to h_{d-1} the current question, which is x at first and then the best x', with an answer
    drawn from the model. A rollout asks no question twice, and ends when the pool is empty. The authors'
    release calls it MCTS; there, a second rollout starts at the last question of the first one.

    Args:
        depth: questions after x, at least 0; 0 is `expected_information_gain`.
        samples: rollouts of each candidate.
    """
    if depth < 0 or samples < 1:
        raise ValueError(
            f"rollout_value: depth {depth} and {samples} samples; expected at least 0 and 1."
        )
    values = expected_information_gain(probs_fn, turn.history, turn.candidates, turn.targets)
    depth = min(depth, int(turn.available.sum(axis=1).min()) - 1)
    rows, pool = turn.candidates.shape
    copies = lambda x: np.repeat(x, pool, axis=0)
    candidates, targets = copies(turn.candidates), copies(turn.targets)
    every = np.arange(rows * pool)
    for sample in range(samples):
        history, left = copies(turn.history), copies(turn.available)
        choice = np.tile(np.arange(pool), rows)
        for step in range(depth):
            asked = candidates[every, choice]
            probs = probs_fn(history, asked[:, None])[:, 0]
            drawn = _drawn(stream(key, "simulated answers", sample, step), probs)
            history, left[every, choice] = with_answers(history, asked, drawn), False
            gains = expected_information_gain(probs_fn, history, candidates, targets)
            choice = choose(gains, left)
            values = values + gains[every, choice].reshape(rows, pool) / samples
    return values


def greedy(probs_fn: ProbsFn) -> Policy:
    """The policy that asks the question of the highest expected information gain."""
    return lambda turn, key: expected_information_gain(
        probs_fn, turn.history, turn.candidates, turn.targets
    )


def look_ahead(probs_fn: ProbsFn, *, depth: int | None = None, samples: int = 1) -> Policy:
    """The policy of `rollout_value`; depth None: to the last question of the episode."""

    def policy(turn, key):
        rest = turn.remaining - 1
        deep = rest if depth is None else min(depth, rest)
        return rollout_value(probs_fn, turn, key, depth=deep, samples=samples)

    return policy


def most_uncertain(probs_fn: ProbsFn) -> Policy:
    """The policy that asks the question of the highest H[p(. | h, x)], whatever the targets are."""
    return lambda turn, key: entropy(probs_fn(turn.history, turn.candidates))


def random_policy(turn: Turn, key: jax.Array) -> np.ndarray:
    """The policy that asks each available question with equal probability."""
    return np.asarray(jax.random.uniform(key, turn.candidates.shape))


def choose(scores: np.ndarray, available: np.ndarray) -> np.ndarray:
    """The place [N] of the highest score among the available ones; the first of equal ones."""
    return np.argmax(np.where(available, scores, -np.inf), axis=1)


def with_answers(history: np.ndarray, questions: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The histories [N, L, 2] with (questions[i], answers[i]) in the first empty place of row i.

    Raises:
        ValueError: if a row has no empty place.
    """
    places = np.sum(history[..., 0] != EMPTY, axis=1)
    if len(places) and places.max() >= history.shape[1]:
        raise ValueError(
            f"with_answers: a history of {history.shape[1]} places is full; make it longer."
        )
    history = history.copy()
    history[np.arange(len(history)), places] = np.stack([questions, answers], axis=-1)
    return history


@dataclasses.dataclass(frozen=True)
class ElicitationEnv:
    """Episodes in which questions of a pool are answered by entities that the model has not seen.

    Pure: `reset` and `step` return the next turn. True answers enter a turn only when they are asked for.

    Attributes:
        answers: [N, Q] integers below `kinds`, of the entity of each episode; EMPTY where unknown.
        targets: [N, T] questions.
        candidates: [N, C] questions.
        initial: [N, I] questions whose answers are known at the start, at least one.
        rounds: questions to ask; at most all of the pool, so that an empty pool ends the episode.
        kinds: number of different answers, A.

    Raises:
        ValueError: for a question twice in an episode, such as a target among the candidates, or an answer
            that is unknown or not below `kinds`.
    """

    answers: np.ndarray
    targets: np.ndarray
    candidates: np.ndarray
    initial: np.ndarray
    rounds: int
    kinds: int

    def __post_init__(self):
        used = np.concatenate([self.initial, self.candidates, self.targets], axis=1)
        if self.initial.shape[1] < 1 or self.rounds < 1:
            raise ValueError(
                f"ElicitationEnv: {self.initial.shape[1]} initial questions and {self.rounds} rounds; "
                "expected at least 1 of each."
            )
        twice = [i for i, row in enumerate(used.tolist()) if len(set(row)) < len(row)]
        if twice:
            raise ValueError(
                f"ElicitationEnv: a question occurs twice in episode {twice[0]}; targets, candidates and "
                f"initial questions must differ, got {used[twice[0]].tolist()}."
            )
        given = np.take_along_axis(self.answers, used, axis=1)
        if given.size and not (0 <= given.min() and given.max() < self.kinds):
            wrong = given[(given < 0) | (given >= self.kinds)][0]
            raise ValueError(
                f"ElicitationEnv: answer {wrong} to a question of an episode; expected 0 to "
                f"{self.kinds - 1}. Leave out questions without an answer ({EMPTY})."
            )

    @property
    def labels(self) -> np.ndarray:
        """The true answers [N, T] to the targets: for measuring, not for a policy."""
        return np.take_along_axis(self.answers, self.targets, axis=1)

    def reset(self) -> Turn:
        """The first turn, with the answers to the initial questions."""
        rows, known = self.initial.shape
        rounds = min(self.rounds, self.candidates.shape[1])
        history = np.full((rows, known + rounds, 2), EMPTY)
        history[:, :known, 0] = self.initial
        history[:, :known, 1] = np.take_along_axis(self.answers, self.initial, axis=1)
        available = np.ones(self.candidates.shape, bool)
        return Turn(history, self.candidates, self.targets, available, rounds)

    def step(self, turn: Turn, choices: np.ndarray) -> Turn:
        """The next turn, after the true answers to the candidates at `choices` [N].

        Raises:
            ValueError: if the episode is over, or a question was asked before.
        """
        rows = np.arange(len(choices))
        if turn.remaining < 1 or not turn.available[rows, choices].all():
            raise ValueError(
                f"ElicitationEnv.step: {turn.remaining} questions remain, and "
                f"{int((~turn.available[rows, choices]).sum())} of the chosen ones were asked before; choose "
                "among `turn.available`."
            )
        asked, available = self.candidates[rows, choices], turn.available.copy()
        available[rows, choices] = False
        history = with_answers(turn.history, asked, self.answers[rows, asked])
        return turn._replace(history=history, available=available, remaining=turn.remaining - 1)


def draw_episodes(
    key: jax.Array,
    answers: np.ndarray,
    number: int,
    *,
    kinds: int,
    targets: int = 5,
    candidates: int = 10,
    initial: int = 1,
    rounds: int = 5,
    always: Sequence[int] = (),
) -> ElicitationEnv:
    """`number` episodes with random entities, targets, candidates and initial questions.

    Args:
        answers: [E, Q] of held-out entities, EMPTY where unknown.
        targets, candidates, initial: numbers of questions in an episode.
        always: questions that are targets of every episode, counted among `targets`.
        rounds, kinds: see `ElicitationEnv`.

    Raises:
        ValueError: if an entity has too few answers, or does not have those of `always`.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(stream(key, "episodes"))))
    always, needed = np.array(always, int), targets + candidates + initial
    counts = (answers != EMPTY).sum(axis=1)
    lacking = counts < needed
    if len(always):
        lacking = lacking | (answers[:, always] == EMPTY).any(axis=1)
    if len(always) > targets:
        raise ValueError(
            f"draw_episodes: always has {len(always)} questions, more than the {targets} targets."
        )
    if lacking.any():
        which = int(np.argmax(lacking))
        raise ValueError(
            f"draw_episodes: entity {which} has {counts[which]} answers; expected at least {needed} "
            f"({targets} targets, {candidates} candidates, {initial} initial), those to {always.tolist()} "
            "among them. Leave the entity out, or ask less."
        )
    entities, asked = rng.integers(0, len(answers), number), []
    for entity in entities:
        free = np.setdiff1d(np.flatnonzero(answers[entity] != EMPTY), always)
        asked.append(np.concatenate([always, rng.permutation(free)])[:needed])
    first, pool, last = np.split(np.array(asked), [targets, targets + candidates], axis=1)
    return ElicitationEnv(answers[entities], first, pool, last, rounds, kinds)


def run_elicitation(
    env: ElicitationEnv, policy: Policy, probs_fn: ProbsFn, key: jax.Array
) -> Trace:
    """Asks the policy's questions until no turn remains; `probs_fn` predicts the targets at each turn."""
    turn = env.reset()
    turns, scores, choices = [turn], [], []
    while turn.remaining:
        scores.append(policy(turn, stream(key, "questions", len(scores))))
        choices.append(choose(scores[-1], turn.available))
        turn = env.step(turn, choices[-1])
        turns.append(turn)
    probs = np.stack([probs_fn(turn.history, turn.targets) for turn in turns])
    return Trace(turns, probs, np.stack(scores), np.stack(choices))


def order_share(
    probs_fn: ProbsFn,
    key: jax.Array,
    history: np.ndarray,
    questions: np.ndarray,
    permutations: int = 8,
) -> float:
    """The share of the variance of p(a | h, z) that is due to the order of the history, 0 to 1.

    The variance over random orders of a history, averaged over histories, over the variance over orders and
    histories. It is 0 for an exchangeable model, such as exact Bayes.

    Args:
        history: [N, L, 2] without empty places.
        questions: [N, Q].
    """
    if (history[..., 0] == EMPTY).any():
        raise ValueError("order_share: histories have empty places; cut them off first.")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(stream(key, "orders"))))
    shuffled = lambda: rng.permuted(np.tile(np.arange(history.shape[1]), (len(history), 1)), axis=1)
    orders = [shuffled() for _ in range(permutations)]
    probs = np.stack(
        [probs_fn(np.take_along_axis(history, o[..., None], axis=1), questions) for o in orders]
    )
    whole = probs.var(axis=(0, 1)).mean()
    return float(probs.var(axis=0).mean() / max(whole, TINY))


def _drawn(key, probs):
    uniform = np.asarray(jax.random.uniform(key, (len(probs), 1)))
    return np.sum(uniform > np.cumsum(probs, axis=1)[:, :-1], axis=1)
