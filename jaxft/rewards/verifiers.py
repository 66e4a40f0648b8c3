"""Verifiers, which decide whether a completion is right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.data import DataError, as_messages, reasoning_gym_task
from jaxft.rewards import mathematics
from jaxft.rewards.answers import (
    accepted_answers,
    needs_mathematics,
    reference_answer,
    same_answer,
)
from jaxft.rewards.notation import plain
from jaxft.rewards.quantities import read_number

Verifier = Callable[[str, Mapping[str, Any]], bool]  # (completion, record) -> right?


def verifier_for(source: str, records: list[Mapping[str, Any]]) -> Verifier | None:
    """The verifier of records of a source, or None if they have no answers to check.

    reasoning-gym tasks have their own; records with an `answer` are compared by `same_answer`. If
    an answer needs mathematics, the process that compares it is started now, so that no verdict's
    time includes the start.

    Raises:
        DataError: if an answer is missing in some records, null, empty, or not a text or number;
            names its place.
        ModuleNotFoundError: for answers in mathematics without math-verify.
    """
    if source.startswith("rg:"):
        return reasoning_gym_verifier(source)
    if not any("answer" in record for record in records):
        return None
    wanted = []
    for number, record in enumerate(records):
        try:
            wanted += accepted_answers(record.get("answer"))
        except DataError as error:
            where = record.get("_where", record.get("id", f"{source}, record {number}"))
            raise DataError(f"{where}: {error}") from None
    if any(map(needs_mathematics, wanted)):
        mathematics.start(wait=True)
    return lambda completion, record: same_answer(completion, record["answer"])


def reasoning_gym_verifier(source: str) -> Verifier:
    """True for full score by the task's own `score_answer`; completions that make it raise are wrong."""
    task = reasoning_gym_task(source)

    def verify(completion, record):
        # Some scorers raise on text that they cannot parse, with any kind of exception.
        try:
            score = task.score_answer(completion.strip(), record["metadata"])
        except Exception:
            return False
        return score is not None and score >= 1.0

    return verify


def answer_reward(
    extract: Callable[[str], str | None],
    equal: Callable[[str, str], bool],
    partial: float = 0.1,
) -> Callable[[str, Mapping[str, Any]], float]:
    """reward(completion, record): 1 for the right answer, `partial` for another one, 0 where there is none.

    ReFT: Luong et al., 2024, arxiv.org/abs/2401.08967, section 3.2: any readable answer gets a
    small reward, because right ones are rare at first.

    Args:
        extract: completion -> its answer or None: `stated_answer`, or `run_python` for programs.
        equal: (answer found, one that the record accepts) -> True if they are the same.

    Raises:
        ValueError: for `partial` outside [0, 1].
        DataError: when called, for a record whose answer is null or empty; see `accepted_answers`.
    """
    if not 0 <= partial <= 1:
        raise ValueError(f"answer_reward: partial must lie in [0, 1], got {partial}.")

    def reward(completion, record):
        wanted = accepted_answers(record["answer"])
        found = extract(completion)
        if found is None:
            return 0.0
        return 1.0 if any(equal(found, answer.strip()) for answer in wanted) else partial

    return reward


def numbers_equal(found: str, answer: str, tolerance: float = 1e-6) -> bool:
    """True if two texts are the same number within the tolerance, or the same text.

    "1,000" is 1000, "$5" is 5, "1/3" is 0.333 with a tolerance of 1e-3.
    """
    values = [read_number(plain(text)) for text in (found, answer)]
    if None in values:
        return found.strip().casefold() == answer.strip().casefold()
    return abs(values[0].value - values[1].value) <= tolerance


def mentions_answer(completion: str, record: Mapping[str, Any]) -> bool:
    """True if an accepted answer occurs in the completion as a whole word, in any format."""
    answer = record.get("answer")
    if answer is None:
        last = (
            as_messages(record) or [{"role": "assistant", "content": record.get("completion")}]
        )[-1]
        answer = last["content"] if last["role"] == "assistant" else None
    if answer is None:  # Only a judge can decide.
        return False
    # For a reference solution, the answer that it ends with.
    words = lambda one: re.escape(reference_answer(str(one)).strip().casefold())
    return any(
        re.search(rf"(?<!\w){words(one)}(?!\w)", completion.casefold())
        for one in (answer if isinstance(answer, (list, tuple)) else [answer])
    )
