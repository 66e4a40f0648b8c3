"""A model's confidence in an answer: how often its sampled answers to one question agree.

Tian et al., 2024, Fine-tuning Language Models for Factuality, arxiv.org/abs/2311.08401, section 3.2. The
rules for texts and the four metrics are those of the authors' code (kttian/llm_factuality_tuning,
parsing.py and score_metrics.py); departures are stated below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ENDS = " <>*().!?,'\""
Normalise = Callable[[str], str]
Equivalent = Callable[[str, str], bool]


class Confidence(NamedTuple):
    """Four measures of the frequencies p_j of classes of equivalent answers."""

    max_conf: float  # max_j p_j, from 1 / number of answers to 1
    exp_conf: float  # Σ_j p_j², the expected frequency of a sampled answer's class
    neg_ent: float  # Σ_j p_j log p_j in nats, at most 0
    samp_conf: (
        float | None
    )  # share of the answers that are equivalent to a given one; None: none given


def normalise_answer(text: str) -> str:
    """Returns an answer without capitals, articles, quotes, hyphens and punctuation.

    "Yes, ..." becomes "yes" and "No ..." becomes "no".
    """
    text = text.lower().strip(_ENDS)
    for article in ("a ", "an ", "the "):
        text = text.removeprefix(article)
    text = text.removesuffix(" and")
    for word in ("yes", "no"):
        if re.match(rf"{word}[,! ]", text):
            text = word
    text = text.replace(",", " ")
    for article in (" the ", " a ", " an "):
        text = text.replace(article, " ")
    return " ".join(re.sub(r"[.?!]", " ", re.sub(r"[-'\"]", "", text)).split())


def equivalent_answers(first: str, second: str) -> bool:
    """Returns whether two normalised answers are taken for the same.

    They are if they are equal, have the same set of words, one ends with the other (not after a comma), or
    one is the other with an "s" at its end. "York" and "New York" are thus the same, which is a choice of
    the authors. An empty answer is only the same as another empty one; in the authors' code every text ends
    with it, so that it joins any class.
    """
    if not first or not second:
        return first == second
    short, long = sorted((first, second), key=len)
    if set(first.split(" ")) == set(second.split(" ")):
        return True
    if long.endswith(short) and not long[: -len(short)].endswith(","):
        return True
    return long == f"{short}s"


def equivalence_classes(
    answers: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    normalise: Normalise = normalise_answer,
    equivalent: Equivalent = equivalent_answers,
) -> dict[str, float]:
    """Returns {first answer of a class, normalised: its frequency}; frequencies sum to 1.

    Each answer in turn joins the first class whose first answer is equivalent to it, so that classes may
    depend on the order.

    Args:
        answers: texts.
        weights: of the answers, not negative; None: all the same.
        normalise: text -> normalised text.
        equivalent: whether two normalised texts belong together.

    Raises:
        ValueError: for weights of another number, or whose sum is not positive.
    """
    weights = [1] * len(answers) if weights is None else list(weights)
    total = math.fsum(weights)
    if len(weights) != len(answers) or (answers and not total > 0):
        raise ValueError(
            f"equivalence_classes: {len(answers)} answers and {len(weights)} weights with the sum {total}; "
            "expected one weight for each answer and a positive sum."
        )
    classes: dict[str, float] = {}
    for answer, weight in zip(map(normalise, answers), weights, strict=True):
        name = next((known for known in classes if equivalent(answer, known)), answer)
        classes[name] = classes.get(name, 0) + weight
    return {name: weight / total for name, weight in classes.items()}


def answer_confidence(
    answers: Sequence[str],
    answer: str | None = None,
    *,
    normalise: Normalise = normalise_answer,
    equivalent: Equivalent = equivalent_answers,
) -> Confidence | None:
    """Returns the confidence that sampled answers express; None if there are none.

    Args:
        answers: sampled answers to one question.
        answer: the answer whose share is `samp_conf`.
        normalise, equivalent: see `equivalence_classes`.
    """
    if not answers:
        return None
    shares = equivalence_classes(answers, normalise=normalise, equivalent=equivalent).values()
    same = None
    if answer is not None:
        known = normalise(answer)
        same = sum(equivalent(known, normalise(other)) for other in answers) / len(answers)
    entropy = math.fsum(share * math.log(share) for share in shares if share > 0)
    return Confidence(max(shares), math.fsum(share**2 for share in shares), entropy, same)
