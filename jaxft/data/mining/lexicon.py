"""Translation probabilities of words from pairs of texts: IBM model 1, where no translation system exists."""

from __future__ import annotations

import numpy as np


def fit_lexicon(source: np.ndarray, target: np.ndarray, *, iterations: int = 5) -> np.ndarray:
    """Returns t [S, T], the probability t(target word | source word), by expectation maximisation.

    IBM model 1: Brown et al., 1993, aclanthology.org/J93-2003, section 4.1, on bags of words: each target
    word was made by one source word of its pair, all of them equally likely beforehand. `source @ t` is
    then the expected translation of bags of source words, the "machine translation" of `align`.

    Args:
        source, target: counts of words, [N, S] and [N, T], in N pairs of texts; a column of ones in
            `source` plays the empty word, to which target words without a source are given.
        iterations: rounds of expectation maximisation; more make t sharper.
    """
    source, target = (np.asarray(x, np.float64) for x in (source, target))
    if source.ndim != 2 or target.ndim != 2 or len(source) != len(target):
        raise ValueError(
            f"fit_lexicon: one row of counts of either side per pair is expected, got shapes "
            f"{source.shape} and {target.shape}."
        )
    table = np.full((source.shape[1], target.shape[1]), 1.0 / target.shape[1])
    for _ in range(iterations):
        expected = source @ table  # [N, T], Σ_s c(s) t(w | s)
        share = np.divide(target, expected, out=np.zeros_like(target), where=expected > 0)
        counts = table * (source.T @ share)
        totals = counts.sum(axis=1, keepdims=True)
        table = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    return table
