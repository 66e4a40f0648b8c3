"""Metrics of models: means, intervals, win rates at equal length, several answers, texts, calibration."""

from jaxft.metrics.alignment import alignment_scores, sentence_links
from jaxft.metrics.calibration import brier, ece, nll
from jaxft.metrics.continual import average_accuracy, forgetting_measure
from jaxft.metrics.factuality import factual_precision
from jaxft.metrics.interval import bootstrap_interval, paired_bootstrap, wilson_interval
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
from jaxft.metrics.overlap import (
    BertScore,
    bert_score,
    copied,
    meteor,
    novel_ngrams,
    rouge,
)
from jaxft.metrics.retrieval import ranked, retrieval_metrics
from jaxft.metrics.samples import (
    exact_pass_rate,
    leader_probability,
    majority_vote,
    pass_at_k,
    rerank,
    weighted_vote,
)
from jaxft.metrics.translation import CorpusScore, bleu, chrf

__all__ = [
    "BertScore",
    "CorpusScore",
    "Mean",
    "Terms",
    "Undivided",
    "WholeMean",
    "alignment_scores",
    "average_accuracy",
    "bleu",
    "brier",
    "bootstrap_interval",
    "chrf",
    "bert_score",
    "combine_means",
    "copied",
    "differentiable",
    "ece",
    "exact_pass_rate",
    "forgetting_measure",
    "factual_precision",
    "is_undivided",
    "length_controlled_rate",
    "leader_probability",
    "majority_vote",
    "meteor",
    "novel_ngrams",
    "nll",
    "paired_bootstrap",
    "pass_at_k",
    "ranked",
    "rerank",
    "retrieval_metrics",
    "rouge",
    "sentence_links",
    "standardised_mean",
    "terms_of",
    "wilson_interval",
    "with_mean",
    "weighted_vote",
]
