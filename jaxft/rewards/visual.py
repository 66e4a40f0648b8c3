"""Rewards for text answers about images and sounds: boxes, points, counts, read text, and choices.

The verifiable rewards in the taxonomy of reinforcement fine-tuning of multimodal models: Sun et al., 2025,
arxiv.org/abs/2505.18536. Each factory takes the records, whose `answer` it checks before work starts, and
returns a RewardFn with values in [0, 1]. An answer that cannot be read gets 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data import DataError
from jaxft.rewards.answers import accepted_answers, same_answer, stated_answer
from jaxft.rewards.boxes import (
    Box,
    Form,
    answer_part,
    from_corners,
    holds,
    ious,
    matched,
    read_boxes,
    read_point,
)
from jaxft.rewards.choices import read_choice
from jaxft.rewards.notation import plain
from jaxft.rewards.pool import RewardFn
from jaxft.rewards.quantities import last_number, read_number

Records = Sequence[Mapping[str, Any]]


def iou_reward(
    records: Records,
    *,
    form: Form = from_corners,
    threshold: float | None = None,
    penalty: float = 0.0,
    read: Callable[[str], list[Box]] | None = None,
) -> RewardFn:
    """Returns a reward: the mean IoU of the wanted boxes with the boxes of a text, matched one to one.

    max(0, (Σ matched IoU - penalty x number of extra boxes) / number of wanted boxes). With one box on both
    sides it is their IoU (Visual-RFT: Liu et al., 2025, arxiv.org/abs/2503.01785, without its confidence).
    Labels are not compared: ask for one kind of object at a time.

    Args:
        records: `answer` is a box, a list of boxes, or a text that `read` reads.
        form: what four numbers mean, in the references and in the texts: `from_corners`, `from_width`,
            `from_centre` or `from_rows`.
        threshold: an IoU of at least this counts as 1 and a smaller one as 0; usually 0.5. None: the IoU.
        penalty: for each box of the text above the number of wanted ones.
        read: text -> boxes; None: `read_boxes` with `form`.

    Raises:
        ValueError: for a threshold outside (0, 1] or a negative penalty.
        DataError: for a record whose answer is not a box or boxes; names its place.
    """
    if threshold is not None and not 0 < threshold <= 1 or penalty < 0:
        raise ValueError(
            f"iou_reward: threshold {threshold} must lie in (0, 1], or be None, and penalty {penalty} must "
            "be at least 0."
        )
    read = read or (lambda text: read_boxes(text, form))
    wanted = lambda record: boxes_of(record.get("answer"), form, read)
    check_references(records, wanted)

    def reward(text, record):
        given, boxes = read(text), wanted(record)
        if not given:
            return 0.0
        scores = ious(given, boxes)
        scores = scores if threshold is None else (scores >= threshold).astype(float)
        extra = max(len(given) - len(boxes), 0)
        return max(0.0, float(matched(scores).sum() - penalty * extra) / len(boxes))

    return _each(reward)


def point_reward(records: Records, *, form: Form = from_corners) -> RewardFn:
    """Returns a reward: 1 if the point of a text lies in one of the record's boxes, else 0.

    The click of an agent for graphical interfaces: it hits the element, or it does not.

    Args:
        records: `answer` as for `iou_reward`.
        form: what four numbers mean in the references.

    Raises:
        DataError: as `iou_reward`.
    """
    wanted = lambda record: boxes_of(record.get("answer"), form)
    check_references(records, wanted)

    def reward(text, record):
        point = read_point(text)
        return float(point is not None and any(holds(box, point) for box in wanted(record)))

    return _each(reward)


def count_reward(records: Records) -> RewardFn:
    """Returns a reward for a number of objects: max(0, 1 - |n - n*| / n*); of n* = 0: 1 for 0, else 0.

    The number of a text is the one that it states (`stated_answer`), in digits or words, or the only one in
    it. A text that offers two has none.

    Args:
        records: `answer` is a whole number n* of at least 0, or its text.

    Raises:
        DataError: for another answer; names its place.
    """
    check_references(records, lambda record: _count(record.get("answer")))

    def reward(text, record):
        found = _number(text)
        return 0.0 if found is None else closeness(found, _count(record["answer"]))

    return _each(reward)


def closeness(count: float, wanted: int) -> float:
    """max(0, 1 - |n - n*| / n*); for n* = 0: 1 if n = 0, else 0."""
    if wanted == 0:
        return float(count == 0)
    return max(0.0, 1.0 - abs(count - wanted) / wanted)


def edit_distance_reward(records: Records, *, fold_case: bool = False) -> RewardFn:
    """Returns a reward for text that was read: max(0, 1 - edit distance / length of the longer text).

    White space is one space, and texts are compared in Unicode's form NFC. The answer of a text is what
    follows </think> and stands in <answer>, if these are there; nothing else is removed, because it was not
    in the image. Of several accepted answers the nearest counts.

    Args:
        records: `answer` is the text, or a list of accepted ones.
        fold_case: compares without case.

    Raises:
        DataError: for an answer that is empty, or not a text; names its place.
    """
    fold = lambda text: _folded(text, fold_case)
    wanted = lambda record: [fold(x) for x in accepted_answers(record.get("answer"))]
    check_references(records, wanted)

    def reward(text, record):
        given = fold(answer_part(text))
        return max(similarity(given, one) for one in wanted(record))

    return _each(reward)


def similarity(a: str, b: str) -> float:
    """1 - `edit_distance` / length of the longer text; 1 of two empty texts."""
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions of characters that turn a into b.

    Levenshtein, 1966. O(len(a) len(b)) character comparisons, a row at a time in NumPy.
    """
    if len(a) < len(b):
        a, b = b, a
    columns = np.arange(len(b) + 1)
    codes, row = np.array([ord(x) for x in b]), columns.copy()
    for i, character in enumerate(a, start=1):
        best = np.empty_like(row)
        best[0] = i
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))
        # An insertion costs 1 more than the column before: min over k <= j of best[k] + j - k.
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def choice_reward(records: Records, *, options: str = "ABCDEFGHIJ") -> RewardFn:
    """Returns a reward for multiple choice: 1 if the text chooses the letter (`same_answer`), else 0.

    "(B)", "B.", "the answer is B" and "B because ..." choose B; "A or B" chooses nothing.

    Args:
        records: `answer` is one of the letters, or a reference such as "(B) Paris".
        options: the letters, a beginning of A to J.

    Raises:
        ValueError: for other options.
        DataError: for an answer that is none of them; names its place.
    """
    if not options or not "ABCDEFGHIJ".startswith(options):
        raise ValueError(f"choice_reward: options {options!r} must begin A, B, ... and end by J.")

    def check(record):
        for one in accepted_answers(record.get("answer")):
            letter = read_choice(one, stated=False)
            if letter is None or letter not in options:
                raise DataError(
                    f"the answer {one!r:.40} is not one of the letters {options}.",
                    "schema",
                )

    check_references(records, check)
    return _each(lambda text, record: float(same_answer(answer_part(text), record["answer"])))


def option_reward(records: Records, *, fold_case: bool = False) -> RewardFn:
    """Returns a reward for multiple choice by text: 1 if the answer part of a text is the option, else 0.

    The answer part is what follows the last </think>, and within it the last <answer>, or all of it without
    these. It must be the option itself, apart from white space around it: "dog" is neither "Dog" nor "a dog".
    The accuracy of R1-AQA: Li et al., 2025, arxiv.org/abs/2503.11197, without its comparison of formulas.

    Args:
        records: `answer` is the right option, or a list of accepted ones.
        fold_case: compares without case.

    Raises:
        DataError: for an answer that is empty, or not a text; names its place.
    """
    fold = lambda text: text.strip().casefold() if fold_case else text.strip()
    wanted = lambda record: {fold(x) for x in accepted_answers(record.get("answer"))}
    check_references(records, wanted)
    return _each(lambda text, record: float(fold(answer_part(text)) in wanted(record)))


def by_kind(rewards: Mapping[str, RewardFn], key: str = "kind") -> RewardFn:
    """Returns a reward for records of several tasks: that of the record's kind.

    Args:
        rewards: the reward function of each kind, which is called once with all texts of the kind.
        key: the column with the kind.

    Raises:
        DataError: when called, for a record of another kind.
    """

    def reward(completions, records):
        kinds = [record.get(key) for record in records]
        if unknown := set(kinds) - set(rewards):
            raise DataError(
                f"by_kind: records of the {key} {sorted(map(repr, unknown))}; there are rewards for "
                f"{sorted(rewards)}."
            )
        found = np.zeros(len(kinds), np.float32)
        for kind in dict.fromkeys(kinds):
            rows = [i for i, one in enumerate(kinds) if one == kind]
            given = rewards[kind]([completions[i] for i in rows], [records[i] for i in rows])
            found[rows] = np.array([np.nan if x is None else x for x in given], np.float32)
        return found

    return reward


def boxes_of(
    answer: Any, form: Form = from_corners, read: Callable[[str], list[Box]] | None = None
) -> list[Box]:
    """The boxes of a reference: four numbers, a list of fours, or a text.

    Raises:
        DataError: for anything else, no box, or corners in the wrong order.
    """
    if isinstance(answer, str):
        found = (read or (lambda text: read_boxes(text, form)))(answer)
    else:
        found = _boxes_of_numbers(answer, form)
    if not found:
        raise DataError(
            f"the answer {answer!r:.60} holds no box; expected four numbers, a list of fours, or "
            "their text.",
            "schema",
        )
    return found


def check_references(records: Records, read: Callable[[Mapping[str, Any]], Any]) -> None:
    """Reads the reference of each record.

    Raises:
        DataError: for the first that cannot be read, with its place.
    """
    if not records:
        raise DataError("no records to reward; give at least one.")
    for number, record in enumerate(records):
        try:
            read(record)
        except (DataError, ValueError) as error:
            where = record.get("_where", record.get("id", f"record {number}"))
            raise DataError(f"{where}: {error}", "schema") from None


def _boxes_of_numbers(answer, form):
    try:
        array = np.asarray(answer, float)
    except (TypeError, ValueError):
        return []
    if array.shape == (4,):
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 4:
        return []
    try:
        return [form(row.tolist()) for row in array]
    except ValueError as error:
        raise DataError(str(error), "schema") from None


def _count(answer):
    """The whole number of a reference."""
    (text,) = accepted_answers(answer) if not isinstance(answer, (list, tuple)) else (str(answer),)
    if not re.fullmatch(r"\s*\+?\d+(\.0*)?\s*", text):
        raise DataError(f"the answer {answer!r:.40} is not a whole number of at least 0.", "schema")
    return int(float(text))


def _number(text):
    """The number that a text states, or the only one in it; None if there are more, or none."""
    text = plain(stated_answer(text) or answer_part(text))
    found = read_number(text)
    if found is None and len(re.findall(r"\d+(?:\.\d+)?", text)) == 1:
        found = last_number(text)
    return None if found is None else float(found.value)


def _folded(text, fold_case):
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if fold_case else text


def _each(reward):
    return lambda completions, records: [
        reward(text, record) for text, record in zip(completions, records, strict=True)
    ]
