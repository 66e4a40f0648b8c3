"""BM25: which passages share the rare words of a text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxft.data.selection.lexrank import sentence_words


def bm25_scores(
    query: str, passages: Sequence[str], *, k1: float = 1.5, b: float = 0.75
) -> np.ndarray:
    """[N] scores of passages for a query; 0 for a passage without a word of the query.

        Σ_w log(1 + (N - n_w + 0.5) / (n_w + 0.5)) tf_w (k1 + 1) / (tf_w + k1 (1 - b + b L / mean L))

    L is the number of words of the passage. The sum is over the words of the query, repeated ones included;
    n_w is the number of passages that have w. Robertson and Zaragoza, 2009, "The Probabilistic Relevance
    Framework: BM25 and Beyond", with the 1 in the logarithm that Lucene adds, so that frequent words do not
    count against a passage.

    Args:
        query: a text.
        passages: texts.
        k1: how much repeated words count; 0: not at all.
        b: how much long passages are discounted, from 0 to 1.

    Raises:
        ValueError: for k1 below 0, or b outside of 0 to 1.
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise ValueError(f"bm25_scores: k1 must be at least 0 and b from 0 to 1, got {k1} and {b}.")
    counts = [Counter(sentence_words(passage)) for passage in passages]
    lengths = np.array([sum(count.values()) for count in counts], float)
    scale = k1 * (1 - b + b * lengths / max(float(np.mean(lengths)) if counts else 1.0, 1e-12))
    scores = np.zeros(len(passages))
    for word, times in Counter(sentence_words(query)).items():
        found = np.array([count[word] for count in counts], float)
        number = np.count_nonzero(found)
        if number:
            idf = math.log(1 + (len(passages) - number + 0.5) / (number + 0.5))
            scores += times * idf * found * (k1 + 1) / (found + scale)
    return scores


def best_passages(query: str, passages: Sequence[str], count: int) -> list[str]:
    """Returns the `count` passages with the highest BM25, best first; equal scores keep their order."""
    order = np.argsort(-bm25_scores(query, passages), kind="stable")
    return [passages[i] for i in order[:count]]
