"""Objectives: a model's apply, a loss and a reduction make objective(params, batch, key)."""

from jaxft.objectives.policy_gradient import completion_log_probs, policy_gradient
from jaxft.objectives.reparametrised import reparametrised
from jaxft.objectives.supervised import Objective, shift, supervised
from jaxft.objectives.trust_region import (
    LogitsFn,
    classifier_logits,
    decoder_logits,
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
    "classifier_logits",
    "completion_log_probs",
    "decoder_logits",
    "function_distance",
    "noise_distance",
    "on_rows",
    "policy_gradient",
    "r3f",
    "r4f",
    "reparametrised",
    "sample_distance",
    "shift",
    "spectrally_normalised",
    "supervised",
    "trust_region",
]
