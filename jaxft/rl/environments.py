"""Environments: batches of episodes in which a policy acts by text and reads observations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.rewards.pool import ProcessPool, RewardFn

Record = Mapping[str, Any]
State = Any


class Reply(NamedTuple):
    """Reply of an environment to an action."""

    reward: float = 0.0  # for this turn; an episode's rewards are summed; NaN: no verdict
    observation: str | None = None  # text that the policy reads next; None: the episode is over
    forced: str = ""  # forced beginning of the policy's next turn


class Environment(NamedTuple):
    """A pure environment for a batch of episodes: states are arguments and results."""

    start: Callable[[Sequence[Record]], Sequence[State]]
    # (states, actions) of the episodes that continue -> (state, reply) for each
    step: Callable[[Sequence[State], Sequence[str]], Sequence[tuple[State, Reply]]]
    turns: int  # maximum actions per episode


def try_again(
    rewards: RewardFn,
    feedback: str = "That is not right. Try again.",
    turns: int = 2,
    right: float = 1.0,
) -> Environment:
    """Returns an environment that replies `feedback` to a wrong answer, and lets the policy retry.

    The reward is that of the last answer, so a wrong answer costs only its turn. An answer without a verdict
    ends the episode with NaN.

    Args:
        right: the smallest reward of a correct answer.
    """
    _check_turns(turns)

    def step(states, actions):
        verdicts = rewards(actions, [record for record, _ in states])
        return [
            ((record, turn + 1), reply(float("nan") if verdict is None else float(verdict), turn))
            for (record, turn), verdict in zip(states, verdicts, strict=True)
        ]

    def reply(verdict, turn):
        # NaN compares False, so the episode ends.
        return Reply(0.0, feedback) if verdict < right and turn + 1 < turns else Reply(verdict)

    return Environment(lambda records: [(record, 0) for record in records], step, turns)


def with_tool(
    tool: ProcessPool,
    call_of: Callable[[str], str | None],
    rewards: RewardFn,
    turns: int = 4,
) -> Environment:
    """Returns an environment with a tool: an action without a call is the answer, judged by `rewards`.

    The tool's result is the next observation, and so is an exception of the tool, from which the policy may
    learn. A call that hangs or kills its process ends the episode with reward NaN. Without an answer within
    `turns`, the reward is 0.

    Args:
        tool: a pool of functions text -> text.
        call_of: function that returns the call in an action, or None; for example `tagged("python")`.
    """
    _check_turns(turns)

    def step(states, actions):
        calls = [call_of(action) for action in actions]
        made = [i for i, call in enumerate(calls) if call is not None]
        replies = dict(zip(made, map(_observed, tool([(calls[i],) for i in made])), strict=True))
        given = [i for i, call in enumerate(calls) if call is None]
        if given:
            verdicts = rewards([actions[i] for i in given], [states[i] for i in given])
            replies |= {i: Reply(float(v)) for i, v in zip(given, verdicts, strict=True)}
        return [(state, replies[i]) for i, state in enumerate(states)]

    return Environment(list, step, turns)


def tagged(name: str) -> Callable[[str], str | None]:
    """Returns a function: the content of the last <name>...</name> of a text, or None."""
    pattern = re.compile(rf"<{re.escape(name)}>(.*?)</{re.escape(name)}>", re.DOTALL)

    def call_of(text):
        found = pattern.findall(text)
        return found[-1] if found else None

    return call_of


def _observed(outcome):
    if outcome.failure is None:
        return Reply(observation=str(outcome.value))
    if outcome.failure == "errors":
        return Reply(observation=f"error: {outcome.value}")
    return Reply(float("nan"))


def _check_turns(turns):
    if turns < 1:
        raise ValueError(f"environment: turns must be at least 1, got {turns}.")
