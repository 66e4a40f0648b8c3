"""Rewards: verifiers and the processes they run in, programs, reward models, accuracy."""

from jaxft.rewards.accuracy import Accuracy, measure_accuracy
from jaxft.rewards.answers import (
    accepted_answers,
    needs_mathematics,
    same_answer,
    stated_answer,
)
from jaxft.rewards.checked import RewardError, checked_reward, checked_rewards
from jaxft.rewards.heads import (
    add_reward_head,
    pair_scores,
    sequence_rewards,
    token_rewards,
)
from jaxft.rewards.pool import (
    Failures,
    OnFirstHost,
    Outcome,
    ProcessPool,
    RewardFn,
    VerifierError,
    VerifierPool,
    in_process,
)
from jaxft.rewards.programs import run_programs, run_python
from jaxft.rewards.reward_models import model_rewards, prefix_verifier
from jaxft.rewards.verifiers import (
    Verifier,
    answer_reward,
    mentions_answer,
    numbers_equal,
    reasoning_gym_verifier,
    verifier_for,
)

__all__ = [
    "add_reward_head",
    "pair_scores",
    "sequence_rewards",
    "token_rewards",
    "Accuracy",
    "Failures",
    "OnFirstHost",
    "Outcome",
    "ProcessPool",
    "RewardError",
    "RewardFn",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "accepted_answers",
    "answer_reward",
    "checked_reward",
    "checked_rewards",
    "in_process",
    "measure_accuracy",
    "mentions_answer",
    "model_rewards",
    "needs_mathematics",
    "numbers_equal",
    "prefix_verifier",
    "reasoning_gym_verifier",
    "run_programs",
    "run_python",
    "same_answer",
    "stated_answer",
    "verifier_for",
]
