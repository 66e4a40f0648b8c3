"""Stances of a model on topics: classifiers of answers, and the distribution of stances over prompts.

The protocol of "Value Drifts": Bhatia et al., 2025, arxiv.org/abs/2510.26707. A stance is one of S labels,
such as STANCES; jaxft.analysis.drift compares distributions of several checkpoints.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from jaxft.analysis.text_model import TextModel

STANCES = ("support", "neutral", "oppose")
FEWEST = 5  # prompts of a topic below which its interval means nothing

# (N prompts, N responses) -> [N, S], the probabilities of the stances of each response
StanceClassifier = Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
# (P prompts, samples, key) -> `samples` responses to each prompt
Generate = Callable[[Sequence[Any], int, jax.Array], Sequence[Sequence[Any]]]


class Stances(NamedTuple):
    """Stances of one model on topics."""

    distribution: dict[str, np.ndarray]  # topic -> [S], p(s | topic)
    # topic -> [P, S], means over each prompt's responses: the rows that a bootstrap draws
    per_prompt: dict[str, np.ndarray]


def stance_distribution(
    generate: Generate,
    prompts_by_topic: Mapping[str, Sequence[Any]],
    classifier: StanceClassifier,
    *,
    samples: int = 5,
    key: jax.Array,
) -> Stances:
    """p(s | T) = mean over prompts x of T and responses y ~ π(. | x) of q(s | x, y).

    Bhatia et al., 2025, arxiv.org/abs/2510.26707, whose q is a language model's; the number of responses is a
    default of ours. Checkpoints are compared under the same `key`, so that they share random numbers and
    equal params give equal distributions: it must not depend on the training step.

    Args:
        generate: samples responses of the model; it is called once, with the prompts of all topics.
        prompts_by_topic: topic -> prompts, in any form that `generate` and `classifier` take.
        classifier: q, such as `PhraseMatcher` or `LabelTokenClassifier`.
        samples: responses to each prompt.
        key: for all responses.

    Raises:
        ValueError: for a topic without prompts, a wrong number of responses, or rows of the classifier that
            are not distributions.
    """
    if not prompts_by_topic or not all(map(len, prompts_by_topic.values())):
        raise ValueError(
            "stance_distribution: every topic needs prompts, got "
            f"{ {topic: len(own) for topic, own in prompts_by_topic.items()} }."
        )
    few = [topic for topic, own in prompts_by_topic.items() if len(own) < FEWEST]
    if few:
        warnings.warn(
            f"stance_distribution: {', '.join(map(str, few))} have fewer than {FEWEST} prompts; bootstrap "
            "intervals of so few are meaningless.",
            stacklevel=2,
        )
    prompts = [prompt for own in prompts_by_topic.values() for prompt in own]
    responses = generate(prompts, samples, key)
    if len(responses) != len(prompts) or any(len(own) != samples for own in responses):
        raise ValueError(
            f"stance_distribution: generate must return {samples} responses to each of {len(prompts)} "
            "prompts."
        )
    asked = [prompt for prompt in prompts for _ in range(samples)]
    q = classified(classifier, asked, [response for own in responses for response in own])
    means = q.reshape(len(prompts), samples, -1).mean(axis=1)
    ends = np.cumsum([len(own) for own in prompts_by_topic.values()])[:-1]
    per_prompt = dict(zip(prompts_by_topic, np.split(means, ends), strict=True))
    return Stances({topic: rows.mean(axis=0) for topic, rows in per_prompt.items()}, per_prompt)


def classified(
    classifier: StanceClassifier, prompts: Sequence[Any], responses: Sequence[Any]
) -> np.ndarray:
    """The classifier's [N, S]; raises ValueError if its rows are not distributions."""
    q = np.asarray(classifier(prompts, responses), float)
    if q.ndim != 2 or len(q) != len(responses):
        raise ValueError(
            f"stances: the classifier returned {q.shape} for {len(responses)} responses; expected one row of "
            "probabilities for each."
        )
    return checked(q, "the classifier")


def checked(p: Any, what: str) -> np.ndarray:
    """`p` [..., S] as an array; raises ValueError if it has an entry below 0 or rows that do not sum to 1."""
    p = np.asarray(p, float)
    if p.ndim < 1 or not np.all(np.abs(p.sum(axis=-1) - 1) < 1e-3) or not np.all(p > -1e-6):
        raise ValueError(
            f"stances: {what} must give probabilities that sum to 1 over the last axis; divide by the sum."
        )
    return p


@dataclasses.dataclass(frozen=True)
class PhraseMatcher:
    """Classifies by exact phrases: equal shares of the stances of which a phrase occurs in the response.

    Text is compared as whole words in any case, token ids as a run of ids.

    Attributes:
        phrases: for each stance its phrases, each a text or a sequence of token ids.
        otherwise: [S], the distribution of a response without any phrase; None: uniform.

    Raises:
        ValueError: for a stance without phrases, an empty phrase, or if `otherwise` is not a distribution.
    """

    phrases: Sequence[Sequence[Any]]
    otherwise: Sequence[float] | None = None

    def __post_init__(self):
        if len(self.phrases) < 2 or not all(own and all(map(_flat, own)) for own in self.phrases):
            raise ValueError(
                "PhraseMatcher: needs at least two stances with at least one phrase each, none of them empty."
            )
        if self.otherwise is not None:
            rest = checked(self.otherwise, "otherwise")
            if rest.shape != (len(self.phrases),):
                raise ValueError(
                    f"PhraseMatcher: otherwise has {rest.size} entries for {len(self.phrases)} stances."
                )

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
        """[N, S] of N responses; the prompts are not read."""
        del prompts
        size, texts = len(self.phrases), list(map(_flat, responses))
        words = lambda own: "|".join(re.escape(_flat(phrase)) for phrase in own)
        patterns = [re.compile(rf"(?<!\w)(?:{words(own)})(?!\w)") for own in self.phrases]
        found = [[pattern.search(text) is not None for pattern in patterns] for text in texts]
        found = np.array(found, float).reshape(len(texts), size)
        rest = np.full(size, 1 / size) if self.otherwise is None else np.asarray(self.otherwise)
        total = found.sum(axis=1, keepdims=True)
        return np.where(total > 0, found / np.maximum(total, 1), rest)


@dataclasses.dataclass(frozen=True)
class LabelTokenClassifier:
    """Classifies by a language model's probabilities of one label token per stance, from one forward pass.

    q(s) = p(label_s | text) / Σ p(label | text): the judge of Bhatia et al., 2025, arxiv.org/abs/2510.26707.

    Attributes:
        model: the judge.
        template: text with {prompt} and {response} that asks for the label.
        labels: one text per stance, which the tokenizer encodes as one token where it follows.
        lead: beginning of the judge's answer, between the template and the label.
        chat: put the template's text into a user's turn of the chat template.

    Raises:
        ValueError: if the template lacks a place; when called, for labels that are not different tokens.
    """

    model: TextModel
    template: str
    labels: Sequence[str]
    lead: str = ""
    chat: bool = False

    def __post_init__(self):
        if "{prompt}" not in self.template or "{response}" not in self.template:
            raise ValueError(
                "LabelTokenClassifier: the template needs {prompt} and {response}, got "
                f"{self.template!r}."
            )

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """[N, S] of N responses."""
        ask = lambda text: self.model.chat([{"role": "user", "content": text}])
        texts = [
            self.template.format(prompt=prompt, response=response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        contexts = [(ask(text) if self.chat else text) + self.lead for text in texts]
        pairs = [self.model.pair(context, label) for context in contexts for label in self.labels]
        self._check(pairs)
        scores = [score for score, _ in self.model.token_scores(pairs, "stances")]
        return scipy.special.softmax(np.reshape(scores, (len(texts), len(self.labels))), axis=1)

    def _check(self, pairs):
        size = len(self.labels)
        for i in range(0, len(pairs), size):
            tokens = [tuple(after) for _, after in pairs[i : i + size]]
            if len(set(tokens)) < size or any(len(after) != 1 for after in tokens):
                raise ValueError(
                    f"LabelTokenClassifier: the labels {list(self.labels)} are the tokens "
                    f"{list(map(list, tokens))}; each must be one token, unlike the others; the template "
                    "and the lead must not end in a blank. Take letters, such as A, B and C."
                )


def with_label_noise(
    classifier: StanceClassifier, rate: float, *, seed: int = 0
) -> StanceClassifier:
    """A classifier that confuses stances: with probability `rate` a row is given to another stance.

    The labels of a row are shifted by the same random number of places, so a certain row of stance s becomes
    one of the others, each with probability rate / (S - 1). Calls with equally many rows share the draws.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"with_label_noise: rate must lie in [0, 1], got {rate}.")

    def noisy(prompts, responses):
        q = np.asarray(classifier(prompts, responses), float)
        rng, size = np.random.default_rng(seed), q.shape[1]
        shift = rng.integers(1, size, len(q)) * (rng.random(len(q)) < rate)
        return np.take_along_axis(q, (np.arange(size) + shift[:, None]) % size, axis=1)

    return noisy


def _flat(value: Any) -> str:
    """A text in lower case with single blanks, or token ids separated by blanks."""
    if isinstance(value, str):
        return " ".join(value.lower().split())
    return " ".join(str(int(token)) for token in value)
