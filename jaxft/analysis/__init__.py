"""Measurements of fine-tuned models."""

from jaxft.analysis.answer_models import (
    Questions,
    answer_probs,
    latent_class_probs,
    meta_dataset,
    model_probs,
)
from jaxft.analysis.behaviours import BEHAVIOURS, behaviour_rates, classify, js_divergence
from jaxft.analysis.drift import (
    Drift,
    DriftTime,
    drift_magnitude,
    drift_time,
    half_width,
    value_gap,
)
from jaxft.analysis.elicitation import (
    ElicitationEnv,
    draw_episodes,
    expected_information_gain,
    greedy,
    look_ahead,
    most_uncertain,
    order_share,
    random_policy,
    rollout_value,
    run_elicitation,
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
    "BEHAVIOURS",
    "D90",
    "ElicitationEnv",
    "Questions",
    "STANCES",
    "Drift",
    "DriftTime",
    "LabelTokenClassifier",
    "PhraseMatcher",
    "StanceClassifier",
    "Stances",
    "TextModel",
    "behaviour_rates",
    "classify",
    "answer_probs",
    "d90_search",
    "draw_episodes",
    "drift_magnitude",
    "drift_time",
    "epsilon_sharpness",
    "evaluate_tasks",
    "expected_information_gain",
    "filter_normalised",
    "greedy",
    "half_width",
    "harness_metrics",
    "harness_model",
    "js_divergence",
    "latent_class_probs",
    "linear_cka",
    "load_tasks",
    "look_ahead",
    "loss_along",
    "meta_dataset",
    "metrics_of",
    "model_probs",
    "most_uncertain",
    "order_share",
    "random_policy",
    "results_table",
    "rollout_value",
    "run_elicitation",
    "satisfactory",
    "stance_distribution",
    "text_embeddings",
    "value_gap",
    "with_label_noise",
]
