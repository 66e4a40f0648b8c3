"""Verifiers: is this completion right?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.data import as_messages, reasoning_gym_task

Verifier = Callable[[str, Mapping[str, Any]], bool]  # (completion, record) -> right?


def verifier_for(source: str, records: list[Mapping[str, Any]]) -> Verifier | None:
    """The verifier of records of a source, or None if their answers cannot be checked.

    reasoning-gym tasks have their own; records with an `answer`, or a `metadata` that has one, are
    compared by `same_answer`.
    """
    if source.startswith("rg:"):
        return reasoning_gym_verifier(source)
    if all("answer" in record for record in records):
        return lambda completion, record: same_answer(completion, str(record["answer"]))
    return None


def reasoning_gym_verifier(source: str) -> Verifier:
    """Full score by the task's own `score_answer`; what makes it raise is wrong."""
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

    ReFT: Luong et al., 2024, arxiv.org/abs/2401.08967, section 3.2: an answer that can be read at all is
    worth a little, since right ones are rare at first.

    Args:
        extract: the answer in a completion, or None: `stated_answer`, or `run_python` for programs.
        equal: (answer found, record["answer"]) -> the same?

    Raises:
        ValueError: for `partial` outside [0, 1]; when called, for a record whose answer is empty.
    """
    if not 0 <= partial <= 1:
        raise ValueError(f"answer_reward: partial must lie in [0, 1], got {partial}.")

    def reward(completion, record):
        answer = str(record["answer"]).strip()
        if not answer:
            raise ValueError(f"answer_reward: the answer of {dict(record)} is empty.")
        found = extract(completion)
        if found is None:
            return 0.0
        return 1.0 if equal(found, answer) else partial

    return reward


def numbers_equal(found: str, answer: str, tolerance: float = 1e-6) -> bool:
    """Whether two texts are the same number within the tolerance, or the same text.

    "1,000" is 1000, "$5" is 5, "1/3" is 0.333 with a tolerance of 1e-3.
    """
    values = [_value(text) for text in (found, answer)]
    if None in values:
        return found.strip().casefold() == answer.strip().casefold()
    return abs(values[0] - values[1]) <= tolerance


def _value(text):
    numerator, slash, denominator = text.replace(",", "").strip().strip("$").partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def mentions_answer(completion: str, record: Mapping[str, Any]) -> bool:
    """Whether the answer occurs in the completion as a whole word: right, whatever the format."""
    last = (as_messages(record) or [{"role": "assistant", "content": record.get("completion")}])[-1]
    answer = last["content"] if last["role"] == "assistant" else None
    answer = record.get("answer") if answer is None else answer
    if answer is None:  # Nobody but a judge knows.
        return False
    pattern = rf"(?<!\w){re.escape(str(answer).strip().casefold())}(?!\w)"
    return re.search(pattern, completion.casefold()) is not None
