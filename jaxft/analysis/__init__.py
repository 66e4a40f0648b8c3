"""Measurements of fine-tuned models."""

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
from jaxft.analysis.text_model import TextModel

__all__ = [
    "D90",
    "TextModel",
    "d90_search",
    "epsilon_sharpness",
    "evaluate_tasks",
    "filter_normalised",
    "harness_metrics",
    "harness_model",
    "linear_cka",
    "load_tasks",
    "loss_along",
    "metrics_of",
    "results_table",
    "satisfactory",
    "text_embeddings",
]
