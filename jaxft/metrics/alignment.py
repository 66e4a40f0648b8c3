"""Precision, recall and F1 of aligned blocks of sentences."""

from __future__ import annotations

from collections.abc import Iterable

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # numbers of sentences in document A and in B


def alignment_scores(found: Iterable[Pair], gold: Iterable[Pair]) -> dict[str, float]:
    """Returns precision, recall and F1 = 2 |found ∩ gold| / (|found| + |gold|) of whole blocks.

    A block counts only if both sides are exactly those of the gold file, so a gold block larger than an
    aligner's moves is always a miss; `alignment_scores(sentence_links(found), sentence_links(gold))` gives
    credit for its parts. No pairs found where gold has none is right: all are 1.
    """
    found, gold = set(found), set(gold)
    right = len(found & gold)
    share = lambda count, of: count / of if of else float(not found and not gold)
    return {
        "precision": share(right, len(found)),
        "recall": share(right, len(gold)),
        "f1": share(2 * right, len(found) + len(gold)),
    }


def sentence_links(pairs: Iterable[Pair]) -> set[Pair]:
    """Returns the 1-1 pairs (i, j) of all sentences i and j of each block."""
    return {((i,), (j,)) for left, right in pairs for i in left for j in right}
