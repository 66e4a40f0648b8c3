"""Objectives: a model's apply, a loss and a reduction make objective(params, batch, key)."""

from jaxft.objectives.coverage import coverage, step_coverage
from jaxft.objectives.critic import (
    completion_values,
    token_values,
    value_loss,
    with_value_head,
    without_value_head,
)
from jaxft.objectives.policy_gradient import completion_log_probs, policy_gradient
from jaxft.objectives.preference import Sequences, bco, hypo, kto, preference, sequence_log_probs
from jaxft.objectives.reparametrised import reparametrised
from jaxft.objectives.reward_model import (
    outcome_reward,
    pairwise_reward,
    process_reward,
)
from jaxft.objectives.supervised import Objective, mean_of, shift, supervised, token_supervised
from jaxft.objectives.trust_region import (
    LogitsFn,
    classifier_logits,
    decoder_logits,
    embedding_noise,
    function_distance,
    noise_distance,
    on_rows,
    r3f,
    r4f,
    sample_distance,
    spectrally_normalised,
    trust_region,
)

__all__ = [
    "LogitsFn",
    "Objective",
    "Sequences",
    "bco",
    "classifier_logits",
    "completion_log_probs",
    "coverage",
    "completion_values",
    "decoder_logits",
    "embedding_noise",
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
    "with_value_head",
    "without_value_head",
]
