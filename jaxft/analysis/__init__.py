"""Measurements of fine-tuned models."""

from jaxft.analysis.behaviours import BEHAVIOURS, behaviour_rates, classify, js_divergence
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
    "BEHAVIOURS",
    "D90",
    "TextModel",
    "behaviour_rates",
    "classify",
    "d90_search",
    "epsilon_sharpness",
    "evaluate_tasks",
    "filter_normalised",
    "harness_metrics",
    "harness_model",
    "js_divergence",
    "linear_cka",
    "load_tasks",
    "loss_along",
    "metrics_of",
    "results_table",
    "satisfactory",
    "text_embeddings",
]
