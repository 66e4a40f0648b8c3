"""Alignment of the sentences of two documents by dynamic programming over similarities of blocks.

Song et al., 2024, Bilingual Corpus Mining and Multistage Fine-Tuning for Improving Machine Translation of
Lecture Transcripts, arxiv.org/abs/2311.03696. Moves, their order, the rule for ties, the mean over both
directions and the vectors are those of the authors' code (shyyhs/CourseraParallelCorpusMining,
src/alignment_algo/align.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.data.errors import DataError

Move = tuple[int, int]  # sentences of either side that become one pair
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # their numbers from 0, in document A and in B
# In order of preference between equal scores; skipping a sentence of B, then of A, comes after them.
MOVES: tuple[Move, ...] = ((1, 2), (2, 1), (1, 1))


class Alignment(NamedTuple):
    """Aligned blocks of two documents, in order; sentences that are in no block have no counterpart."""

    pairs: list[Pair]
    score: float  # sum of the similarities of the pairs


def align(
    a: np.ndarray,
    b: np.ndarray,
    a_from_b: np.ndarray,
    b_from_a: np.ndarray,
    *,
    moves: Sequence[Move] = MOVES,
    name: str = "document",
) -> Alignment:
    """Aligns documents A (n sentences) and B (m sentences) so that the sum of similarities is the largest.

    Each vector is a sum over the words of one sentence (`sum_vectors`), or a sentence embedding times the
    number of words. The vector of a block is the sum over its sentences: cosines do not depend on the
    length of a vector, so this is the paper's mean over all words of the block.

    Args:
        a, b: [n, D] and [m, E], the sentences in their own languages.
        a_from_b: [m, D], B's sentences translated into A's language.
        b_from_a: [n, E], A's sentences translated into B's language.
        moves: sizes of blocks, in order of preference; the paper has 1-2, 2-1 and 1-1.
        name: the document's name in errors.

    Raises:
        DataError: if sentences and translations differ in number, vectors in size, or a value is not finite.
    """
    arrays = {"A": a, "B": b, "A from B": a_from_b, "B from A": b_from_a}
    arrays = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    for key, value in arrays.items():
        if value.ndim != 2 or not np.isfinite(value).all():
            raise DataError(
                f"{name}: the vectors of {key} must be finite and of shape [sentences, size], got shape "
                f"{value.shape}."
            )
    for side, other in (("A", "B"), ("B", "A")):
        sentences, translations = len(arrays[side]), len(arrays[f"{other} from {side}"])
        if sentences != translations:
            raise DataError(
                f"{name}: {side} has {sentences} sentences but {translations} translations; expected one "
                "translation of each sentence, an empty one included."
            )
        if arrays[side].shape[1] != arrays[f"{side} from {other}"].shape[1]:
            raise DataError(
                f"{name}: {side} and its translations have vectors of sizes {arrays[side].shape[1]} and "
                f"{arrays[f'{side} from {other}'].shape[1]}; use the same vectors for both."
            )
    tables = block_similarities(*arrays.values(), moves=moves)
    return best_path(tables, len(arrays["A"]), len(arrays["B"]))


def block_similarities(
    a: np.ndarray,
    b: np.ndarray,
    a_from_b: np.ndarray,
    b_from_a: np.ndarray,
    *,
    moves: Sequence[Move] = MOVES,
) -> dict[Move, np.ndarray]:
    """Returns {(p, q): [n - p + 1, m - q + 1]}, similarities of p sentences of A with q of B.

    sim(I, J) = (cos(A_I, A'_J) + cos(B_J, B'_I)) / 2, where A' and B' are translations and a cosine with
    a zero vector is 0 (it is NaN in the authors' code, whose comparisons then skip the move).
    """
    return {
        (p, q): (
            _cosines(_blocks(a, p), _blocks(a_from_b, q))
            + _cosines(_blocks(b_from_a, p), _blocks(b, q))
        )
        / 2
        for p, q in moves
    }


def best_path(similarities: Mapping[Move, np.ndarray], n: int, m: int) -> Alignment:
    """Returns the monotone path of blocks with the largest sum of similarities; skipping is free.

    F(i, j) = max over moves (p, q) of F(i + p, j + q) + sim(i, j), F(i, j + 1) and F(i + 1, j), with F = 0
    past either end. Equal scores prefer the earlier move, then (0, 1), then (1, 0). Bottom-up, a row at a
    time, where the authors' recursion overflows the stack. A move that does not fit, which has the score 0 in
    their code, and a block without a positive similarity are left out; neither changes the score.

    Args:
        similarities: {(p, q): [n - p + 1, m - q + 1]} with p and q of at least 1, in order of preference.
        n, m: sentences of A and of B.
    """
    if any(min(move) < 1 for move in similarities):
        raise ValueError(f"best_path: moves must be at least (1, 1), got {list(similarities)}.")
    score = np.zeros((n + 1, m + 1))
    choice = np.zeros((n, m), np.int8)
    for i in reversed(range(n)):
        options = np.full((len(similarities) + 2, m), -np.inf)
        for row, ((p, q), table) in zip(options, similarities.items(), strict=False):
            if i + p <= n and q <= m:
                total = score[i + p, q:] + table[i]
                row[: m - q + 1] = np.where(table[i] > 0, total, -np.inf)
        options[-1] = score[i + 1, :-1]
        # F(i, j) = max(options(j), F(i, j + 1)) is a running maximum from the right, where F(i, m) = 0.
        score[i, :-1] = np.maximum.accumulate(options.max(axis=0, initial=0.0)[::-1])[::-1]
        options[-2] = score[i, 1:]
        choice[i] = options.argmax(axis=0)  # the first of equal ones
    moves = [*similarities, (0, 1), (1, 0)]
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        p, q = moves[choice[i, j]]
        if p and q:
            pairs.append((tuple(range(i, i + p)), tuple(range(j, j + q))))
        i, j = i + p, j + q
    return Alignment(pairs, float(score[0, 0]))


def greedy_pairs(similarity: np.ndarray, least: float = 0.0) -> list[Pair]:
    """Returns 1-1 pairs of a table [n, m], most similar first, each sentence in at most one: a baseline.

    Pairs whose similarity is at most `least` are left out. The order of the documents does not count.
    """
    rows, columns = np.unravel_index(
        np.argsort(-similarity, axis=None, kind="stable"), similarity.shape
    )
    used_a, used_b, pairs = set(), set(), []
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        if similarity[i, j] > least and i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            pairs.append(((i,), (j,)))
    return sorted(pairs)


def sum_vectors(
    sentences: Sequence[Sequence[str]], vectors: Mapping[str, np.ndarray], size: int
) -> np.ndarray:
    """Returns [N, size], the sum of the vectors of each sentence's words; unknown words are skipped.

    A sentence without known words has the zero vector, whose similarities are 0.
    """
    sums = np.zeros((len(sentences), size))
    for row, words in zip(sums, sentences, strict=True):
        for word in words:
            if word in vectors:
                row += vectors[word]
    return sums


def join_pairs(
    pairs: Sequence[Pair], a: Sequence[str], b: Sequence[str], separator: str = " "
) -> list[tuple[str, str]]:
    """Returns the text of both sides of each pair; sentences of a block are joined by `separator`."""
    join = lambda texts, places: separator.join(texts[i].strip() for i in places)
    return [(join(a, left), join(b, right)) for left, right in pairs]


def parse_pairs(text: str, name: str = "gold alignment") -> list[Pair]:
    """Reads the authors' gold file: "5,6 5" says that sentences 5 and 6 of A are sentence 5 of B, from 1.

    A block of more than two sentences ("17,18,19,20,21,22 16") is one pair, which the paper's moves cannot
    find. The released file has the line "51 51" between "60 50" and "62 52", where 61 is meant;
    pairs are returned as they are written.

    Raises:
        DataError: for a line of another form, with its number.
    """
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        sides = line.split()
        numbers = [side.split(",") for side in sides]
        if len(sides) != 2 or not all(x.isdecimal() and int(x) for side in numbers for x in side):
            raise DataError(
                f"{name}, line {number}: {line!r:.60} is not two lists of sentence numbers from 1, such as "
                "'5,6 5'."
            )
        left, right = (tuple(int(x) - 1 for x in side) for side in numbers)
        pairs.append((left, right))
    return pairs


def _blocks(vectors: np.ndarray, size: int) -> np.ndarray:
    """[n - size + 1, D]: the sums over `size` consecutive sentences, of unit length or zero."""
    count = max(len(vectors) - size + 1, 0)
    total = sum(vectors[k : k + count] for k in range(size))
    norms = np.linalg.norm(total, axis=1, keepdims=True)
    return total / np.where(norms > 0, norms, 1.0)


def _cosines(left, right):
    return left @ right.T
