"""Quality of retrieval: how high the relevant texts of each query are ranked."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def ranked(queries: np.ndarray, corpus: np.ndarray, count: int, rows: int = 1024) -> np.ndarray:
    """[N, count] int: for each query [N, D] the texts of the corpus [M, D] with the largest inner products.

    Equal scores keep the corpus' order. `rows` queries are scored at a time.
    """
    count = min(count, len(corpus))
    found = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ corpus.T
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :count])
    return np.concatenate(found)


def retrieval_metrics(
    ranking: np.ndarray, relevant: Sequence[Collection[int]], at: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """Means over queries of recall@k, MRR@k and nDCG@k, as sentence-transformers' evaluator defines them.

    Args:
        ranking: [N, K] texts by rank, from `ranked`; K must be at least the largest of `at`, or all texts.
        relevant: for each query, the texts that answer it; at least one. Relevance is 0 or 1.
        at: ranks k at which the list is cut.

    Raises:
        ValueError: for a query without a relevant text.
    """
    if len(ranking) != len(relevant) or not all(len(texts) for texts in relevant):
        raise ValueError(
            f"retrieval_metrics: {len(ranking)} rankings and {len(relevant)} sets of relevant texts; "
            "expected one set, not empty, for each query."
        )
    hits = np.array(
        [[text in set(texts) for text in row] for row, texts in zip(ranking, relevant, strict=True)]
    )
    sizes = np.array([len(set(texts)) for texts in relevant])
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    metrics = {}
    for k in at:
        cut = hits[:, :k]
        first = np.where(cut.any(axis=1), 1 / (1 + cut.argmax(axis=1)), 0.0)
        gain = cut @ discounts[: cut.shape[1]]
        best = np.cumsum(1 / np.log2(np.arange(2, k + 2)))[np.minimum(sizes, k) - 1]
        metrics[f"recall@{k}"] = float(np.mean(cut.sum(axis=1) / sizes))
        metrics[f"mrr@{k}"] = float(np.mean(first))
        metrics[f"ndcg@{k}"] = float(np.mean(gain / best))
    return metrics
