"""Reinforcement learning of language models: advantages, experience, algorithms."""

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
from jaxft.rl.collection import Sample, answers, collect, collect_from
from jaxft.rl.environments import Environment, Reply, tagged, try_again, with_tool
from jaxft.rl.experience import Experience, KlControl
from jaxft.rl.exploratory import answers_of_both, xpo
from jaxft.rl.on_device import (
    DeviceReward,
    collect_on_device,
    equals,
    estimate_success,
    sample_on_device,
)
from jaxft.rl.online import (
    best_and_worst,
    online_preference,
    samples_beside,
)
from jaxft.rl.rollouts import Credit, sample_groups, score
from jaxft.rl.self_training import offline_collect, online_self_training, right_samples
from jaxft.rl.turns import episodes

__all__ = [
    "Algorithm",
    "Credit",
    "DeviceReward",
    "Environment",
    "Experience",
    "KlControl",
    "Reply",
    "Sample",
    "answers",
    "answers_of_both",
    "best_and_worst",
    "cispo",
    "collect",
    "collect_from",
    "collect_on_device",
    "dapo",
    "dr_grpo",
    "episodes",
    "equals",
    "estimate_success",
    "expert_iteration",
    "grpo",
    "gspo",
    "nft",
    "offline_collect",
    "online_preference",
    "online_self_training",
    "ppo",
    "reinforce_plus_plus",
    "reinforce_with_baseline",
    "right_samples",
    "rloo",
    "sample_groups",
    "sample_on_device",
    "samples_beside",
    "score",
    "tagged",
    "try_again",
    "with_tool",
    "xpo",
]
