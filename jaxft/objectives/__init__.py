"""Objectives: a model's apply, a loss and a reduction make objective(params, batch, key)."""

from jaxft.objectives.preference import Sequences, bco, hypo, kto, preference, sequence_log_probs
from jaxft.objectives.reparametrised import reparametrised
from jaxft.objectives.reward_model import (
    add_reward_head,
    outcome_reward,
    pairwise_reward,
    process_reward,
    sequence_rewards,
    token_rewards,
)
from jaxft.objectives.supervised import Objective, shift, supervised

__all__ = [
    "Objective",
    "Sequences",
    "add_reward_head",
    "bco",
    "hypo",
    "kto",
    "outcome_reward",
    "pairwise_reward",
    "preference",
    "process_reward",
    "reparametrised",
    "sequence_log_probs",
    "sequence_rewards",
    "shift",
    "supervised",
    "token_rewards",
]
