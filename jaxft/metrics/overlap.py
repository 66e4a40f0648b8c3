"""Overlap of two texts: ROUGE, METEOR, BERTScore, copied parts.

ROUGE and METEOR are those of the packages rouge-score and nltk (pip install 'jaxft[papers]').
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rouge(
    candidates: Sequence[str],
    references: Sequence[str],
    kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
    *,
    stemmer: bool = True,
) -> dict[str, np.ndarray]:
    """name -> [N, 3] precision, recall and F1 of each pair of texts, by rouge-score.

    Lin, 2004, aclanthology.org/W04-1013. An empty text scores 0. rouge-score removes all characters but
    letters and digits of English.

    Args:
        kinds: rouge1 to rouge9, rougeL, and rougeLsum, for which lines are sentences.
        stemmer: compares words by their Porter stems.

    Raises:
        ModuleNotFoundError: if rouge-score is not installed.
        ValueError: for different numbers of texts.
    """
    _same_number("rouge", candidates, references)
    scorer = _module("rouge_score.rouge_scorer").RougeScorer(list(kinds), use_stemmer=stemmer)
    rows = [scorer.score(*pair) for pair in zip(references, candidates, strict=True)]
    return {kind: np.array([row[kind] for row in rows], float).reshape(-1, 3) for kind in kinds}


def meteor(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[N] METEOR of each pair of texts, given as words, by nltk: words match exactly or by stem.

    Banerjee and Lavie, 2005, aclanthology.org/W05-0909. Synonyms, which need WordNet's data, do not match,
    so that values are at most those of the full metric.

    Raises:
        ModuleNotFoundError: if nltk is not installed.
        ValueError: for different numbers of texts.
    """
    _same_number("meteor", candidates, references)
    score = _module("nltk.translate.meteor_score").single_meteor_score
    pairs = zip(references, candidates, strict=True)
    return np.array([score(list(r), list(c), wordnet=_NoSynonyms()) for r, c in pairs])


class BertScore(NamedTuple):
    """Precision, recall and F1 [B]."""

    precision: jax.Array
    recall: jax.Array
    f1: jax.Array


def bert_score(
    candidates: Float[Array, "B T D"],
    references: Float[Array, "B S D"],
    candidate_weights: Float[Array, "B T"],
    reference_weights: Float[Array, "B S"],
) -> BertScore:
    """Greedy matching of token vectors by cosine: Zhang et al., 2020, arxiv.org/abs/1904.09675, section 3.

        P = Σ_i w_i max_j cos(x_i, y_j) / Σ_i w_i over the candidate's tokens,  R likewise over the
        reference's,  F1 = 2 P R / (P + R)

    The vectors are those of any encoder. Values are not rescaled by a baseline, as the authors' package
    does on request. A pair with an empty text scores 0.

    Args:
        candidate_weights: weights of tokens, 0 for padding; ones, or idf. Tokens of weight 0 match nothing.
        reference_weights: the same of the references.
    """
    x, y = (_unit(vectors) for vectors in (candidates, references))
    similarity = jnp.einsum("btd,bsd->bts", x, y)
    known = (candidate_weights > 0)[:, :, None] & (reference_weights > 0)[:, None]
    similarity = jnp.where(known, similarity, -jnp.inf)

    def matched(weights, axis):
        best = jnp.max(similarity, axis=axis, initial=-jnp.inf)
        total = jnp.sum(jnp.where(jnp.isfinite(best), best, 0.0) * weights, axis=1)
        return _ratio(total, jnp.sum(weights, axis=1))

    precision, recall = matched(candidate_weights, 2), matched(reference_weights, 1)
    return BertScore(precision, recall, _ratio(2 * precision * recall, precision + recall))


def novel_ngrams(candidate: Sequence[str], source: Sequence[str], n: int) -> float:
    """The share of a text's n-grams that its source does not have; NaN if it has fewer than n words.

    See et al., 2017, arxiv.org/abs/1704.04368, section 7.2.

    Args:
        candidate: words of a summary.
        source: words of what it summarises.
    """
    grams = [tuple(candidate[i : i + n]) for i in range(len(candidate) - n + 1)]
    known = {tuple(source[i : i + n]) for i in range(len(source) - n + 1)}
    return float(np.mean([gram not in known for gram in grams])) if grams else float("nan")


def copied(candidate: Sequence[str], source: Sequence[str]) -> tuple[float, float]:
    """(coverage, density): the share of copied words, and the mean length of the fragment of a word.

    With F the fragments of the source that a greedy search from left to right finds in the candidate,
    Σ_f |f| / n and Σ_f |f|² / n over its n words: Grusky et al., 2018, arxiv.org/abs/1804.11283, section
    4. Both are NaN for a text without words.
    """
    places: dict[str, list[int]] = {}
    for j, word in enumerate(source):
        places.setdefault(word, []).append(j)
    sizes, i = [], 0
    while i < len(candidate):
        size = max(
            (_common(candidate, i, source, j) for j in places.get(candidate[i], ())), default=0
        )
        sizes.append(size)
        i += max(size, 1)
    if not sizes:
        return float("nan"), float("nan")
    return sum(sizes) / len(candidate), sum(size**2 for size in sizes) / len(candidate)


class _NoSynonyms:
    """Stands for nltk's WordNet, which needs a download."""

    def synsets(self, word):
        del word
        return []


def _common(a, i, b, j):
    size = 0
    while i + size < len(a) and j + size < len(b) and a[i + size] == b[j + size]:
        size += 1
    return size


def _unit(vectors):
    vectors = vectors.astype(jnp.float32)
    norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(norms > 0, norms, 1.0)


def _ratio(total, weight):
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def _module(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = {"rouge_score": "rouge-score"}.get(name.split(".")[0], name.split(".")[0])
        raise ModuleNotFoundError(
            f"this metric needs {package}: pip install 'jaxft[papers]'"
        ) from None


def _same_number(name, candidates, references):
    if len(candidates) != len(references):
        raise ValueError(
            f"{name}: {len(candidates)} candidates and {len(references)} references; expected one "
            "reference for each candidate."
        )
