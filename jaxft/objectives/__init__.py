"""Objectives: a forward, a loss and a reduction make objective(params, batch, key)."""

from jaxft.objectives.consolidation import consolidated, fisher_diagonal
from jaxft.objectives.critic import (
    completion_values,
    token_values,
    value_loss,
    with_value_head,
    without_value_head,
)
from jaxft.objectives.cross_encoders import reranking
from jaxft.objectives.dco import coverage, step_coverage
from jaxft.objectives.embeddings import contrastive, distilled_margins
from jaxft.objectives.next_token import Objective, mean_of, shift, supervised, token_supervised
from jaxft.objectives.policy import completion_log_probs, policy_gradient
from jaxft.objectives.preferences import Sequences, bco, hypo, kto, preference, sequence_log_probs
from jaxft.objectives.reparametrisation import reparametrised
from jaxft.objectives.reward_model import (
    outcome_reward,
    pairwise_reward,
    process_reward,
)
from jaxft.objectives.routing import RouterTerms, router_terms
from jaxft.objectives.teacher import distillation, with_teacher, without_teacher
from jaxft.objectives.trust_regions import (
    LogitsFn,
    classifier_logits,
    embedding_noise,
    function_distance,
    noise_distance,
    on_rows,
    r3f,
    r4f,
    sample_distance,
    spectrally_normalised,
    token_logits,
    trust_region,
)

__all__ = [
    "RouterTerms",
    "router_terms",
    "LogitsFn",
    "Objective",
    "Sequences",
    "bco",
    "classifier_logits",
    "completion_log_probs",
    "consolidated",
    "contrastive",
    "coverage",
    "distillation",
    "distilled_margins",
    "completion_values",
    "token_logits",
    "embedding_noise",
    "fisher_diagonal",
    "function_distance",
    "hypo",
    "kto",
    "mean_of",
    "noise_distance",
    "on_rows",
    "outcome_reward",
    "pairwise_reward",
    "policy_gradient",
    "preference",
    "process_reward",
    "r3f",
    "r4f",
    "reparametrised",
    "reranking",
    "sample_distance",
    "sequence_log_probs",
    "shift",
    "spectrally_normalised",
    "step_coverage",
    "supervised",
    "token_supervised",
    "token_values",
    "trust_region",
    "value_loss",
    "with_teacher",
    "with_value_head",
    "without_teacher",
    "without_value_head",
]
