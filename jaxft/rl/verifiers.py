"""Verifiers: is this completion right?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.data import as_messages, reasoning_gym_task

Verifier = Callable[[str, Mapping[str, Any]], bool]  # (completion, record) -> right?

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


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


def same_answer(completion: str, answer: str) -> bool:
    """Equal text, ignoring case, outer space and a final stop; or, for numbers, the last number.

    GSM8K's "reasoning #### 42" counts as 42 on both sides.
    """
    completion, answer = (text.split("####")[-1].strip() for text in (completion, answer))
    if completion.casefold().rstrip(".") == answer.casefold().rstrip("."):
        return True
    wanted = _NUMBER.fullmatch(answer)
    found = _NUMBER.findall(completion)
    number = lambda text: float(text.replace(",", ""))
    return bool(wanted and found) and number(found[-1]) == number(answer)


def mentions_answer(completion: str, record: Mapping[str, Any]) -> bool:
    """Whether the answer occurs in the completion as a whole word: right, whatever the format."""
    messages = as_messages(record)
    answer = messages[-1]["content"] if messages else record["completion"]
    pattern = rf"(?<!\w){re.escape(answer.strip().casefold())}(?!\w)"
    return re.search(pattern, completion.casefold()) is not None
