"""Measurements of fine-tuned models."""

from jaxft.analysis.drift import (
    Drift,
    DriftTime,
    drift_magnitude,
    drift_time,
    half_width,
    value_gap,
)
from jaxft.analysis.harness import (
    evaluate_tasks,
    harness_metrics,
    harness_model,
    load_tasks,
    metrics_of,
    results_table,
)
from jaxft.analysis.intrinsic_dimension import D90, d90_search, satisfactory
from jaxft.analysis.sentences import text_embeddings
from jaxft.analysis.sharpness import epsilon_sharpness, filter_normalised, linear_cka, loss_along
from jaxft.analysis.stance import (
    STANCES,
    LabelTokenClassifier,
    PhraseMatcher,
    StanceClassifier,
    Stances,
    stance_distribution,
    with_label_noise,
)
from jaxft.analysis.text_model import TextModel

__all__ = [
    "D90",
    "STANCES",
    "Drift",
    "DriftTime",
    "LabelTokenClassifier",
    "PhraseMatcher",
    "StanceClassifier",
    "Stances",
    "TextModel",
    "d90_search",
    "drift_magnitude",
    "drift_time",
    "epsilon_sharpness",
    "evaluate_tasks",
    "filter_normalised",
    "half_width",
    "harness_metrics",
    "harness_model",
    "linear_cka",
    "load_tasks",
    "loss_along",
    "metrics_of",
    "results_table",
    "satisfactory",
    "stance_distribution",
    "text_embeddings",
    "value_gap",
    "with_label_noise",
]
