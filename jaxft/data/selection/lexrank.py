"""LexRank: the central sentences of a document, as input of a model that cannot read all of it.

    idf = inverse_document_frequencies(training_texts)
    shortened = " ".join(select_sentences(text, idf, 1024, lambda s: len(tokenizer(s)["input_ids"])))

Erkan and Radev, 2004, "LexRank: Graph-based Lexical Centrality as Salience in Text Summarization", Journal
of Artificial Intelligence Research 22, pages 457 to 479.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z0-9])|\n\s*\n")
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
# Abbreviations that never end a sentence, and those that do not before a number.
_OPEN = frozenset(
    "fig figs eq eqs pat ser appl pp vol vs cf e.g i.e dr mr mrs ms prof approx".split()
)
_NUMBERED = frozenset("no nos sec ref refs para claim claims cl".split())
_INITIALS = re.compile(r"^(?:[A-Za-z]\.)*[A-Za-z]$|^(?:al|inc|ltd|co|corp)$")
# After initials ("U.S.", "J.", "et al.") only such a word begins a sentence.
_STARTERS = frozenset(
    "The A An In It Its This These That Those There As At For From If On One Other To When Where While "
    "With However Accordingly Additionally Furthermore Moreover Therefore Thus Hence Here".split()
)


class Idf(NamedTuple):
    """Inverse document frequencies in nats: `weights` of known words, `unseen` of all others."""

    weights: Mapping[str, float]
    unseen: float  # log of the number of documents


def split_sentences(text: str) -> list[str]:
    """Sentences of English text, stripped, in order; their words are exactly those of the text.

    A sentence ends at ., ! or ?, with closing quotes and brackets, before a capital letter or a digit, and
    at an empty line. It does not end after an abbreviation ("FIG. 1", "e.g.", "Pat. No. 5"), initials
    ("U.S. Pat.", "J. Smith") unless a word such as "The" follows, or the number of a claim ("1. A device").
    """
    sentences, start = [], 0
    for end in _END.finditer(text):
        if end.group().isspace() or not _goes_on(text[start : end.start()], text[end.end() :]):
            sentences.append(" ".join(text[start : end.end()].split()))
            start = end.end()
    sentences.append(" ".join(text[start:].split()))
    return [sentence for sentence in sentences if sentence]


def sentence_words(sentence: str) -> list[str]:
    """Lower-case words; hyphens and apostrophes inside a word belong to it. No stop words are removed."""
    return _WORD.findall(sentence.lower())


def inverse_document_frequencies(texts: Iterable[str]) -> Idf:
    """log(N / df) of each word, df the number of the N texts that have it; log N for unseen words.

    (The package `lexrank` has log(N + 1) for these.)

    Raises:
        ValueError: if there is no text.
    """
    counts: Counter[str] = Counter()
    number = 0
    for number, text in enumerate(texts, 1):  # noqa: B007
        counts.update(set(sentence_words(text)))
    if not number:
        raise ValueError(
            "inverse_document_frequencies: no texts; pass those of the training split."
        )
    return Idf({word: math.log(number / df) for word, df in counts.items()}, math.log(number))


def idf_modified_cosine(sentences: Sequence[str], idf: Idf) -> np.ndarray:
    """[n, n] similarities of sentences, and 1 on the diagonal.

        sim(x, y) = Σ_w tf_xw tf_yw idf_w² / (sqrt(Σ_w (tf_xw idf_w)²) sqrt(Σ_w (tf_yw idf_w)²))

    Eq. 1 of the paper; 0 for two sentences of which one has no word of positive idf.
    """
    counts = [Counter(sentence_words(sentence)) for sentence in sentences]
    column = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    vectors = np.zeros((len(sentences), len(column)))
    for row, words in zip(vectors, counts, strict=True):
        for word, count in words.items():
            row[column[word]] = count * idf.weights.get(word, idf.unseen)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norms > 0, norms, 1.0)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, 1.0)
    return similarity


def lexrank_scores(
    similarity: np.ndarray,
    threshold: float | None = None,
    damping: float = 0.15,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 200,
) -> np.ndarray:
    """Centralities p [n], whose sum is 1: p = d/n + (1 - d) Bᵀ p, by power iteration from 1/n.

    B is the similarity matrix divided by the sums of its rows: continuous LexRank, section 3.3 of the
    paper. With a threshold, entries above it count 1 and all others 0 (section 3.2, where 0.1 is best). The
    paper's damping lies between 0.1 and 0.2.

    Args:
        similarity: [n, n], at least 0; diagonal included, as from `idf_modified_cosine`.
        threshold: None: continuous.
        damping: d, probability of a jump to any sentence.
        tolerance: L1 change of p at which the iteration ends.

    Raises:
        ValueError: for a matrix that is not square, is empty, has a negative entry or a row without a
            positive entry; for damping outside 0..1; and for damping 0 if the graph is not connected,
            because p then depends on its start.
    """
    matrix = np.asarray(similarity, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"lexrank_scores: similarity {matrix.shape}; expected [n, n] for n >= 1 sentences."
        )
    if not 0 <= damping <= 1:
        raise ValueError(f"lexrank_scores: damping must lie in 0..1, got {damping}.")
    weights = matrix if threshold is None else (matrix > threshold).astype(float)
    sums = weights.sum(axis=1, keepdims=True)
    if (matrix < 0).any() or not (sums > 0).all():
        raise ValueError(
            "lexrank_scores: needs entries of at least 0 and one above the threshold in each row, such as 1 "
            "on the diagonal."
        )
    count = len(matrix)
    if damping == 0 and not _connected(weights > 0):
        raise ValueError(
            "lexrank_scores: damping 0 with a graph that is not connected; use a positive damping, such as "
            "0.15, or a lower threshold."
        )
    transition = weights / sums
    scores = np.full(count, 1 / count)
    for _ in range(max_steps):
        last, scores = scores, damping / count + (1 - damping) * transition.T @ scores
        if np.abs(scores - last).sum() < tolerance:
            break
    return scores


def within_budget(
    scores: np.ndarray,
    lengths: Sequence[int],
    budget: int,
    similarity: np.ndarray | None = None,
    *,
    redundant: float = 0.9,
) -> list[int]:
    """Sentences taken in descending order of their scores while they fit; numbers in document order.

    A sentence that does not fit is passed over, and shorter ones after it are tried. Equal scores keep
    document order: with zeros this is the beginning of the document.

    Args:
        lengths: tokens of each sentence.
        budget: maximum tokens of all taken sentences.
        similarity: [n, n]; sentences more than `redundant` similar to a taken one are passed over.
    """
    taken: list[int] = []
    left = budget
    for i in np.argsort(-np.asarray(scores, float), kind="stable").tolist():
        new = similarity is None or all(similarity[i, j] <= redundant for j in taken)
        if new and lengths[i] <= left:
            taken.append(i)
            left -= lengths[i]
    return sorted(taken)


def select_sentences(
    text: str,
    idf: Idf,
    budget: int,
    length: Callable[[str], int],
    *,
    threshold: float | None = None,
    damping: float = 0.15,
    redundant: float = 0.9,
) -> list[str]:
    """The most central sentences of a document that fit a budget, in the document's order.

    `within_budget` of `lexrank_scores`, except that a text that fits is returned whole. If no sentence fits,
    the most central one is cut to its first words, with a warning.

    Args:
        budget: maximum tokens, the sum over sentences.
        length: sentence -> its tokens.

    Raises:
        ValueError: for a text without words, or a budget below 1.
    """
    sentences = split_sentences(text)
    if not sentences or budget < 1:
        raise ValueError(
            f"select_sentences: a text of {len(sentences)} sentences and a budget of {budget} tokens; "
            "expected at least one of each."
        )
    lengths = [length(sentence) for sentence in sentences]
    if sum(lengths) <= budget:
        return sentences
    similarity = idf_modified_cosine(sentences, idf)
    scores = lexrank_scores(similarity, threshold, damping)
    if taken := within_budget(scores, lengths, budget, similarity, redundant=redundant):
        return [sentences[i] for i in taken]
    words = sentences[int(np.argmax(scores))].split()
    fits = [n for n in range(1, len(words) + 1) if length(" ".join(words[:n])) <= budget]
    warnings.warn(
        f"select_sentences: no sentence fits {budget} tokens; the most central one, of {len(words)} words, "
        f"is cut to {max(fits, default=0)}.",
        stacklevel=2,
    )
    return [" ".join(words[: max(fits)])] if fits else []


def _connected(edges):
    """Returns whether each node of a graph [n, n] is reached from every other node."""
    reached = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges).bit_length()):
        reached = reached.astype(float) @ reached > 0
    return bool(reached.all())


def _goes_on(before, after):
    """Returns whether a sentence `before` a full stop continues with `after`."""
    words = before.split()
    if not words:
        return True
    word, following = words[-1].lstrip("(["), after.split()[0]
    name = word.lower()
    if name in _OPEN or (name in _NUMBERED and following[0].isdigit()):
        return True
    if word.isdigit() and len(words) == 1:
        return True
    return bool(_INITIALS.match(word)) and following not in _STARTERS
