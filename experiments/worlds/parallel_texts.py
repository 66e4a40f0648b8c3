"""Documents in two languages whose sentences do not correspond one to one, with the true alignment.

A document begins as pairs of sentences. Its second side is then edited: sentences are merged, split, deleted
and inserted, as between the subtitles of a lecture in two languages. "Machine translation" of a sentence is
its true counterpart with words replaced and dropped. `words` makes documents of random words; `Language` is a
toy language pair with two domains, from whose documents translation pairs are mined.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.data import mining
from jaxft.metrics import alignment_scores

Words = list[str]
Clause = tuple[Words, Words]  # source, target
Sentence = list[Clause]
MERGED, SPLIT, DELETED, INSERTED = 0.08, 0.08, 0.06, 0.06


class Document(NamedTuple):
    """A document in two languages, the true translations of either side, and the true alignment."""

    source: list[Words]
    target: list[Words]
    source_of_target: list[Words]  # the target's sentences in the source language
    target_of_source: list[Words]
    gold: list[mining.Pair]


def edited(
    rng: np.random.Generator, sentences: Sequence[Sentence], new: Callable[[], Sentence]
) -> Document:
    """Edits the target side of a document, as the rates of this module say.

    A merge makes one target sentence of two source sentences; a split cuts a sentence of several clauses
    into two; an insertion is a target sentence, from `new`, without a source.
    """
    target: list[Sentence] = []
    gold: list[mining.Pair] = []
    i = 0
    while i < len(sentences):
        draw = rng.random()
        if rng.random() < INSERTED:
            target.append(new())
        j, sentence, taken = len(target), list(sentences[i]), 1
        if draw < MERGED and i + 1 < len(sentences):
            taken = 2
            target.append(sentence + list(sentences[i + 1]))
            gold.append(((i, i + 1), (j,)))
        elif draw < MERGED + SPLIT and len(sentence) > 1:
            half = len(sentence) // 2
            target += [sentence[:half], sentence[half:]]
            gold.append(((i,), (j, j + 1)))
        elif draw >= 1 - DELETED:
            pass
        else:
            target.append(sentence)
            gold.append(((i,), (j,)))
        i += taken
    side = lambda given, number: [
        [word for clause in sentence for word in clause[number]] for sentence in given
    ]
    return Document(side(sentences, 0), side(target, 1), side(target, 0), side(sentences, 1), gold)


def words(
    rng: np.random.Generator, sentences: int = 40, vocabulary: int = 400, skew: float = 0.0
) -> Document:
    """Returns a document of 5 to 15 words a sentence, of 60 topic words that are drawn by Zipf's law.

    Word w of the source language, "a<w>", is "b<w>" in the target language, in the same order.

    Args:
        skew: exponent of the distribution of the topic words in sentences; 0: uniform, 1: Zipf's law, under
            which the same few words are in most sentences.
    """
    zipf = 1 / np.arange(1, vocabulary + 1)
    topic = rng.choice(vocabulary, 60, replace=False, p=zipf / zipf.sum())
    shares = np.arange(1, 61) ** -skew

    def new():
        ids = rng.choice(topic, rng.integers(5, 16), p=shares / shares.sum())
        return [([f"a{w}"], [f"b{w}"]) for w in ids]

    return edited(rng, [new() for _ in range(sentences)], new)


def noisy(
    rng: np.random.Generator, sentences: Sequence[Words], rate: float, vocabulary: Sequence[str]
) -> list[Words]:
    """Replaces each word by a random one with probability `rate`, and drops it with probability rate / 2."""
    replace = lambda word: _one(rng, vocabulary) if rng.random() < rate else word
    return [[replace(w) for w in words if rng.random() >= rate / 2] for words in sentences]


def vectors_of(
    rng: np.random.Generator, vocabulary: Sequence[str], size: int
) -> dict[str, np.ndarray]:
    """Returns a random vector of each word."""
    return dict(zip(vocabulary, rng.standard_normal((len(vocabulary), size)), strict=True))


def sums_of(
    rng: np.random.Generator,
    document: Document,
    rate: float,
    vocabularies: Sequence[Sequence[str]],
    size: int = 64,
) -> list[np.ndarray]:
    """Returns the four arrays of `mining.align` by translations with the error rate, and random vectors."""
    tables = [vectors_of(rng, vocabulary, size) for vocabulary in vocabularies]
    translated = [
        noisy(rng, document.source_of_target, rate, vocabularies[0]),
        noisy(rng, document.target_of_source, rate, vocabularies[1]),
    ]
    sides = zip((document.source, document.target, *translated), tables * 2, strict=True)
    return [mining.sum_vectors(sentences, table, size) for sentences, table in sides]


def scored_aligners(arrays: Sequence[np.ndarray]) -> dict[str, list[mining.Pair]]:
    """Returns the pairs of the dynamic program, of the most similar pairs first, and of the diagonal."""
    single = mining.block_similarities(*arrays, moves=((1, 1),))[1, 1]
    return {
        "dynamic program": mining.align(*arrays).pairs,
        "greedy": mining.greedy_pairs(single),
        "diagonal": [((i,), (i,)) for i in range(min(single.shape))],
    }


@dataclasses.dataclass(frozen=True)
class Language:
    """A toy language pair: a dictionary, another word order, and two endings of the target language.

    Source: "the red fox catch +ed a bird in the wood and ..."; target: subject, place, object, verb;
    adjectives follow their nouns and prepositions become postpositions; +o marks the object and +ta
    the past. There are two domains: the second shares `shared` of its stems with the first.
    """

    nouns: int = 100
    verbs: int = 50
    adjectives: int = 50
    shared: float = 0.6

    @functools.cache  # noqa: B019 (frozen, and few)
    def stems(self, domain: int) -> dict[str, list[str]]:
        """Returns the source stems of each kind in domain 0 or 1."""
        kinds = {"n": self.nouns, "v": self.verbs, "j": self.adjectives}
        start = lambda count: round((1 - self.shared) * count) if domain else 0
        return {k: [f"{k}{start(c) + i}" for i in range(c)] for k, c in kinds.items()}

    def vocabulary(self) -> tuple[list[str], list[str]]:
        """Returns all words of the source and of the target language."""
        stems = dict.fromkeys(s for d in (0, 1) for x in self.stems(d).values() for s in x)
        function = ["the", "a", "in", "on", "and", "+ed"]
        return [*function, *stems], [
            *map(str.upper, function[:-1]),
            "+o",
            "+ta",
            *map(str.upper, stems),
        ]

    def clause(self, rng: np.random.Generator, domain: int) -> Clause:
        """Draws a clause of a domain."""
        stems = self.stems(domain)
        one = lambda kind: _one(rng, stems[kind])

        def phrase(case=()):
            article, noun = _one(rng, ("the", "a")), one("n")
            adjective = [one("j")] if rng.random() < 0.4 else []
            upper = [article.upper(), noun.upper(), *case, *map(str.upper, adjective)]
            return [article, *adjective, noun], upper

        subject, thing, verb = phrase(), phrase(["+o"]), one("v")
        past = rng.random() < 0.5
        source = [*subject[0], verb, *["+ed"] * past, *thing[0]]
        place: Words = []
        if rng.random() < 0.3:
            where, preposition = phrase(), _one(rng, ("in", "on"))
            source += [preposition, *where[0]]
            place = [*where[1], preposition.upper()]
        return source, [*subject[1], *place, *thing[1], verb.upper(), *["+ta"] * past]

    def sentence(self, rng: np.random.Generator, domain: int) -> Sentence:
        """Draws a sentence: one clause in domain 0, two with "and" in domain 1."""
        if not domain:
            return [self.clause(rng, 0)]
        source, target = self.clause(rng, 1)
        return [self.clause(rng, 1), (["and", *source], ["AND", *target])]

    def document(self, rng: np.random.Generator, sentences: int = 40) -> Document:
        """Draws a document of domain 1 with an edited target side."""
        new = lambda: self.sentence(rng, 1)
        return edited(rng, [new() for _ in range(sentences)], new)


def mined_pairs(
    language: Language, rng: np.random.Generator, count: int, rate: float = 0.2, longest: int = 32
) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """Returns (`count` pairs mined from documents of domain 1 and cleaned, statistics of the mining).

    Translations of the documents have the error rate `rate`. Statistics: mean F1 of the documents'
    alignments, and the fraction of their pairs that are wrong, before cleaning.
    """
    vocabularies, pairs, f1, wrong = language.vocabulary(), [], [], []
    filters = {
        "length ratio": mining.length_ratio(2.0),
        "too long": lambda *sides: max(len(side.split()) for side in sides) <= longest,
        "untranslated": mining.translated,
    }
    while len(pairs) < count:
        document = language.document(rng)
        found = mining.align(*sums_of(rng, document, rate, vocabularies)).pairs
        f1.append(alignment_scores(found, document.gold)["f1"])
        wrong.append(np.mean([pair not in set(document.gold) for pair in found]))
        texts = [list(map(" ".join, side)) for side in (document.source, document.target)]
        pairs += mining.join_pairs(found, *texts)
        pairs, _ = mining.clean(mining.without_duplicates(pairs), filters)
    return pairs[:count], {"f1": float(np.mean(f1)), "wrong": float(np.mean(wrong))}


def surface(text: str) -> str:
    """Returns the text with endings joined to their stems."""
    return text.replace(" +", "")


def _one(rng, values):
    """A random element; rng.choice would make an array of all of them first."""
    return values[rng.integers(len(values))]
