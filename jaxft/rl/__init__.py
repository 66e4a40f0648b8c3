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
from jaxft.rl.pool import (
    Failures,
    OnFirstHost,
    Outcome,
    ProcessPool,
    RewardFn,
    VerifierError,
    VerifierPool,
    in_process,
)
from jaxft.rl.programs import run_programs, run_python
from jaxft.rl.reward_models import model_rewards
from jaxft.rl.rollouts import Credit, sample_groups, score
from jaxft.rl.self_training import offline_collect, online_self_training, right_samples
from jaxft.rl.turns import episodes
from jaxft.rl.verifiers import (
    Verifier,
    answer_reward,
    mentions_answer,
    numbers_equal,
    reasoning_gym_verifier,
    same_answer,
    stated_answer,
    verifier_for,
)

__all__ = [
    "Accuracy",
    "Algorithm",
    "Credit",
    "DeviceReward",
    "Environment",
    "Experience",
    "Failures",
    "OnFirstHost",
    "KlControl",
    "Outcome",
    "ProcessPool",
    "Reply",
    "RewardFn",
    "Sample",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "answer_reward",
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
    "in_process",
    "measure_accuracy",
    "mentions_answer",
    "model_rewards",
    "nft",
    "numbers_equal",
    "offline_collect",
    "online_preference",
    "online_self_training",
    "ppo",
    "reasoning_gym_verifier",
    "reinforce_plus_plus",
    "reinforce_with_baseline",
    "right_samples",
    "rloo",
    "run_programs",
    "run_python",
    "same_answer",
    "sample_groups",
    "sample_on_device",
    "samples_beside",
    "score",
    "stated_answer",
    "tagged",
    "try_again",
    "verifier_for",
    "with_tool",
    "xpo",
]
