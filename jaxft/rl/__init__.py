"""Reinforcement learning from verifiers: rewards, advantages, experience, algorithms."""

from jaxft.rl.accuracy import Accuracy, measure_accuracy
from jaxft.rl.algorithms import (
    Algorithm,
    cispo,
    dapo,
    dr_grpo,
    expert_iteration,
    grpo,
    gspo,
    nft,
    ppo,
    reinforce_plus_plus,
    reinforce_with_baseline,
    rloo,
)
from jaxft.rl.experience import Experience, KlControl, collect
from jaxft.rl.on_device import DeviceReward, collect_on_device, equals, sample_on_device
from jaxft.rl.pool import Failures, RewardFn, VerifierError, VerifierPool, in_process
from jaxft.rl.rollouts import sample_groups, score
from jaxft.rl.verifiers import (
    Verifier,
    mentions_answer,
    reasoning_gym_verifier,
    same_answer,
    verifier_for,
)

__all__ = [
    "Accuracy",
    "Algorithm",
    "DeviceReward",
    "Experience",
    "Failures",
    "KlControl",
    "RewardFn",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "cispo",
    "collect",
    "collect_on_device",
    "dapo",
    "dr_grpo",
    "equals",
    "expert_iteration",
    "grpo",
    "gspo",
    "in_process",
    "measure_accuracy",
    "mentions_answer",
    "nft",
    "ppo",
    "reasoning_gym_verifier",
    "reinforce_plus_plus",
    "reinforce_with_baseline",
    "rloo",
    "same_answer",
    "sample_groups",
    "sample_on_device",
    "score",
    "verifier_for",
]
