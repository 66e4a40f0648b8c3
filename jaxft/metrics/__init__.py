"""Metrics of models: running means, intervals, win rates at equal length, several answers, translations."""

from jaxft.metrics.alignment import alignment_scores, sentence_links
from jaxft.metrics.interval import wilson_interval
from jaxft.metrics.length import length_controlled_rate, standardised_mean
from jaxft.metrics.mean import (
    Mean,
    Terms,
    Undivided,
    WholeMean,
    combine_means,
    differentiable,
    is_undivided,
    terms_of,
    with_mean,
)
from jaxft.metrics.retrieval import ranked, retrieval_metrics
from jaxft.metrics.samples import exact_pass_rate, majority_vote, pass_at_k, rerank
from jaxft.metrics.translation import CorpusScore, bleu, chrf

__all__ = [
    "CorpusScore",
    "Mean",
    "Terms",
    "Undivided",
    "WholeMean",
    "alignment_scores",
    "bleu",
    "chrf",
    "combine_means",
    "differentiable",
    "exact_pass_rate",
    "is_undivided",
    "length_controlled_rate",
    "majority_vote",
    "pass_at_k",
    "ranked",
    "rerank",
    "retrieval_metrics",
    "sentence_links",
    "standardised_mean",
    "terms_of",
    "wilson_interval",
    "with_mean",
]
