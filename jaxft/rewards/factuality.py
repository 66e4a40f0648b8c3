r"""Truthfulness of long texts: claims, whether they are true, and preference pairs of responses.

    extract = PatternClaimExtractor(r"(?P<attribute>\w+): (?P<value>\w+)", question="{subject} {attribute}?")
    scores = score_responses(samples, extract, ReferenceScorer(corpus), held_out=test_subjects)
    pairs = factual_pairs(samples, scores).pairs

Tian et al., 2024, Fine-tuning Language Models for Factuality (FactTune), arxiv.org/abs/2311.08401: a
response's score is the mean over its claims of their truth, which is checked against a reference
(`ReferenceScorer`, FactTune-FS) or is the model's confidence (`ConfidenceScorer`, FactTune-MC).
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxft.data import DataError, Judged, all_pairs, judge_pairs
from jaxft.data.selection import best_passages, split_sentences
from jaxft.rewards.confidence import (
    Confidence,
    Equivalent,
    Normalise,
    answer_confidence,
    equivalent_answers,
    normalise_answer,
)


class Claim(NamedTuple):
    """One statement of a response."""

    subject: str  # what the text is about: a person, a disease
    text: str  # understandable without the response
    question: str | None = None  # whose short answer the claim gives; names the subject
    answer: str | None = None  # that answer


class ResponseScore(NamedTuple):
    """The truthfulness of a response."""

    value: float | None  # mean over the claims with a score; None: there are none
    claims: tuple[Claim, ...]
    scores: tuple[float | None, ...]  # of the claims; None: no verdict
    dropped: tuple[Claim, ...]  # claims without a verdict


ClaimExtractor = Callable[
    [Sequence[str], Sequence[str]], list[list[Claim]]
]  # (subjects, responses)
Truth = Callable[[Sequence[Claim]], list[float | None]]  # such as the scorers below
Generate = Callable[[Sequence[str]], Sequence[str]]  # prompts of a language model -> its texts
# (claims, the passages to check each with) -> whether they support it; None: undecided
Verify = Callable[[Sequence[Claim], Sequence[Sequence[str]]], Sequence[bool | None]]


@dataclasses.dataclass(frozen=True)
class PatternClaimExtractor:
    """(subjects, responses) -> the claims of each response: the matches of a pattern, without repetitions.

    The texts are templates for str.format of the pattern's named groups and `subject`.

    Raises:
        ValueError: when made, if a template has a field that the pattern lacks.
    """

    pattern: str  # a regular expression with named groups
    text: str = "{subject} {attribute} {value}"
    question: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        known = {"subject", *re.compile(self.pattern).groupindex}
        for name in ("text", "question", "answer"):
            fields = {part[1] for part in string.Formatter().parse(getattr(self, name) or "")}
            if lacking := fields - {None} - known:
                raise ValueError(
                    f"PatternClaimExtractor: {name} has {sorted(lacking)}, but the pattern's groups and "
                    f"subject are {sorted(known)}; name the groups (?P<name>...)."
                )

    def __call__(self, subjects: Sequence[str], responses: Sequence[str]) -> list[list[Claim]]:
        """Returns the claims of each response."""
        pairs = zip(subjects, responses, strict=True)
        return [list(dict.fromkeys(self._claims(*pair))) for pair in pairs]

    def _claims(self, subject, response):
        for match in re.finditer(self.pattern, response):
            groups = {**match.groupdict(), "subject": subject}
            texts = (self.text, self.question, self.answer)
            yield Claim(subject, *(text and text.format(**groups) for text in texts))


FACTS = """Split a sentence about a subject into its separate facts, one per line after a hyphen. Each fact
is a full sentence that names the subject.

Subject: Marie Curie
Sentence: She was born in Warsaw and won two Nobel Prizes.
- Marie Curie was born in Warsaw.
- Marie Curie won two Nobel Prizes.

Subject: {subject}
Sentence: {sentence}
"""
QUESTION = """Turn a fact into a question that names the subject, and its short answer.

Subject: Marie Curie
Fact: Marie Curie was born in Warsaw.
Question: In which city was Marie Curie born?
Answer: Warsaw

Subject: {subject}
Fact: {fact}
"""
CHECK = """Does the reference support the fact? Answer True or False.

Reference: {passages}
Fact: {fact}
Answer:"""


@dataclasses.dataclass(frozen=True)
class LMClaimExtractor:
    """(subjects, responses) -> the claims of each response, which a language model finds in two steps.

    The first step splits each sentence into facts, the second makes a question and an answer of each fact. A
    fact whose question cannot be read has none, so that `ConfidenceScorer` gives no verdict on it. Equal
    prompts are asked once; `resumable(generate, path)` keeps their answers.
    """

    generate: Generate
    facts: str = FACTS  # with {subject} and {sentence}; the answer has a fact per line, after "- "
    ask: str | None = QUESTION  # with {subject} and {fact}; None: claims have no questions

    def __call__(self, subjects: Sequence[str], responses: Sequence[str]) -> list[list[Claim]]:
        """Returns the claims of each response, without repetitions."""
        texts = list(zip(subjects, map(split_sentences, responses), strict=True))
        prompt = lambda subject, sentence: self.facts.format(subject=subject, sentence=sentence)
        answers = _asked(self.generate, [prompt(s, part) for s, parts in texts for part in parts])
        found = [
            [(s, fact) for part in parts for fact in _listed(answers[prompt(s, part)])]
            for s, parts in texts
        ]
        questions = {}
        if self.ask is not None:
            questions = {c: self.ask.format(subject=c[0], fact=c[1]) for row in found for c in row}
        answers = _asked(self.generate, questions.values())
        made = {c: Claim(*c, *_question(answers[prompt])) for c, prompt in questions.items()}
        return [[made.get(c, Claim(*c)) for c in dict.fromkeys(row)] for row in found]


@dataclasses.dataclass(frozen=True)
class LMVerifier:
    """(claims, passages) -> whether a language model finds each claim in its passages; see `Verify`.

    The model's answer has to begin with True or False (Yes or No); any other answer is undecided.
    """

    generate: Generate
    prompt: str = CHECK  # with {passages} and {fact}

    def __call__(
        self, claims: Sequence[Claim], passages: Sequence[Sequence[str]]
    ) -> list[bool | None]:
        """Returns the verdicts."""
        texts = [
            self.prompt.format(passages="\n".join(part), fact=claim.text)
            for claim, part in zip(claims, passages, strict=True)
        ]
        answers = _asked(self.generate, texts)
        return [_verdict(answers[text]) for text in texts]


def stated(claims: Sequence[Claim], passages: Sequence[Sequence[str]]) -> list[bool | None]:
    """Returns whether each claim's text is one of its passages: the verifier of a base of facts."""
    return [claim.text in part for claim, part in zip(claims, passages, strict=True)]


@dataclasses.dataclass(frozen=True)
class ReferenceScorer:
    """Claims -> 1 if the reference supports a claim, 0 if not, None if undecided: FactTune-FS.

    With `stated` and all facts about each subject, a response's score is its exact precision.
    """

    corpus: Mapping[str, Collection[str]]  # subject -> passages, such as those of its article
    verify: Verify = stated
    top: int | None = None  # passages to check with, the best by BM25; None: all

    def __call__(self, claims: Sequence[Claim]) -> list[float | None]:
        """Returns the scores.

        Raises:
            ValueError: for claims whose subjects have no passages; all such subjects are named.
        """
        if lacking := sorted({c.subject for c in claims if not self.corpus.get(c.subject)}):
            raise ValueError(
                f"ReferenceScorer: the corpus has no passages of {len(lacking)} subjects ({_some(lacking)}); "
                "add them, or leave these subjects out."
            )
        passages = [self.corpus[claim.subject] for claim in claims]
        if self.top is not None:
            passages = [
                best_passages(c.text, list(p), self.top)
                for c, p in zip(claims, passages, strict=True)
            ]
        verdicts = self.verify(claims, passages)
        _check_number("verify", verdicts, claims, "verdicts")
        return [None if verdict is None else float(verdict) for verdict in verdicts]


@dataclasses.dataclass(frozen=True)
class ConfidenceScorer:
    """Claims -> the confidence of a model's sampled answers to their questions: FactTune-MC.

    Claims with the same question share its answers. A claim without a question or without answers, and for
    `samp_conf` without an answer, has no score.

    Raises:
        ValueError: when made, for an unknown metric or no samples.
    """

    # (questions, number of samples) -> answers to each; the paper: a pretrained model at temperature 1 with
    # top-p 0.9, after some examples, at most 15 tokens up to the first newline
    sample: Callable[[Sequence[str], int], Sequence[Sequence[str]]]
    num_samples: int = 20
    metric: Literal["max_conf", "exp_conf", "neg_ent", "samp_conf"] = "max_conf"
    normalise: Normalise = normalise_answer
    equivalent: Equivalent = equivalent_answers

    def __post_init__(self) -> None:
        if self.metric not in Confidence._fields or self.num_samples < 1:
            raise ValueError(
                f"ConfidenceScorer: metric must be one of {', '.join(Confidence._fields)} and num_samples at "
                f"least 1, got {self.metric!r} and {self.num_samples}."
            )

    def __call__(self, claims: Sequence[Claim]) -> list[float | None]:
        """Returns the scores."""
        questions = list(dict.fromkeys(c.question for c in claims if c.question is not None))
        found = self.sample(questions, self.num_samples) if questions else []
        _check_number("sample", found, questions, "lists of answers")
        answers = dict(zip(questions, found, strict=True))
        rules = {"normalise": self.normalise, "equivalent": self.equivalent}
        confidence = lambda c: answer_confidence(answers.get(c.question, ()), c.answer, **rules)
        found = map(confidence, claims)
        return [None if one is None else getattr(one, self.metric) for one in found]


def score_responses(
    samples: Sequence[Mapping[str, Any]],
    extract: ClaimExtractor,
    truth: Truth,
    *,
    held_out: Collection[str] = (),
) -> list[list[ResponseScore]]:
    """Returns the scores of all responses, grouped as in `samples`.

    Equal responses about one subject are read once, and `extract` and `truth` are called once, with all
    responses and all different claims. The mean does not depend on the order of claims.

    Args:
        samples: records with `subject` and `responses`.
        extract: (subjects, responses) -> claims of each.
        truth: claims -> their scores; None or NaN: no verdict.
        held_out: subjects of the test split, which must not be scored for training.

    Raises:
        DataError: for held-out subjects, before any work.
    """
    held_out = set(held_out)
    if found := sorted({record["subject"] for record in samples} & held_out):
        raise DataError(
            f"score_responses: {len(found)} subjects are held out for the test ({_some(found)}); split by "
            "subject, not by prompt."
        )
    texts = dict.fromkeys((r["subject"], text) for r in samples for text in r["responses"])
    claims = extract([s for s, _ in texts], [text for _, text in texts]) if texts else []
    _check_number("extract", claims, texts, "lists of claims")
    claims = dict(zip(texts, claims, strict=True))
    unique = list(dict.fromkeys(claim for row in claims.values() for claim in row))
    values = truth(unique) if unique else []
    _check_number("truth", values, unique, "scores")
    scores = dict(zip(unique, map(_known, values), strict=True))
    return [
        [_response_score(claims[r["subject"], text], scores) for text in r["responses"]]
        for r in samples
    ]


def factual_pairs(
    samples: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[ResponseScore]],
    *,
    min_gap: float = 0.0,
) -> Judged:
    """Pairs every two responses to a prompt of which one has a score higher by more than `min_gap`.

    Responses without a score are in no pair; `unscored` counts them.

    Raises:
        DataError: if there is no pair at all.
    """
    values = [[score.value for score in row] for row in scores]
    judged = judge_pairs(samples, values, min_gap=min_gap, choose=all_pairs)
    if not judged.pairs:
        raise DataError(
            f"no preference pairs: every prompt's scores tie ({len(samples)} prompts, {judged.unscored} "
            f"responses without a score, min_gap {min_gap:g}); sample more responses per prompt or at a "
            "higher temperature, or check the scorer."
        )
    return judged


def _response_score(claims, scores):
    found = [scores[claim] for claim in claims]
    known = [score for score in found if score is not None]
    # fsum: the order of claims must not turn a tie into a pair.
    value = math.fsum(known) / len(known) if known else None
    dropped = [c for c, score in zip(claims, found, strict=True) if score is None]
    return ResponseScore(value, tuple(claims), tuple(found), tuple(dropped))


def _known(score):
    return None if score is None or math.isnan(score) else float(score)


def _asked(generate, prompts):
    """{prompt: answer}; equal prompts are asked once."""
    prompts = list(dict.fromkeys(prompts))
    answers = generate(prompts) if prompts else []
    _check_number("generate", answers, prompts, "texts")
    return dict(zip(prompts, answers, strict=True))


def _listed(text):
    """The lines of a list, up to the first line that does not belong to it."""
    lines = [line.strip() for line in text.strip().splitlines()]
    facts = []
    for line in lines:
        found = re.match(r"(?:[-*•]|\d+[.)])\s+(.+)", line)
        if not found:
            break
        facts.append(found[1].strip())
    return facts


def _question(text):
    """(question, answer) of the second step; (None, None) if it has no question."""
    question = re.search(r"Question:\s*(\S[^\n]*)", text)
    answer = re.search(r"Answer:\s*(\S[^\n]*)", text[question.end() :] if question else "")
    return (question and question[1].strip(), answer and answer[1].strip())


def _verdict(text):
    found = re.match(r"\W*(true|yes|false|no)\b", text, re.IGNORECASE)
    return None if found is None else found[1].lower() in ("true", "yes")


def _some(names, count=5):
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _check_number(name, found, expected, what):
    if len(found) != len(expected):
        raise ValueError(f"{name}: {len(found)} {what} for {len(expected)}; expected one for each.")
