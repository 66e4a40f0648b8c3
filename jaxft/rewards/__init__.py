"""Rewards: verifiers and the processes they run in, programs, reward models, accuracy, factuality."""

from jaxft.rewards.accuracy import Accuracy, measure_accuracy
from jaxft.rewards.answers import (
    accepted_answers,
    needs_mathematics,
    same_answer,
    stated_answer,
)
from jaxft.rewards.checked import RewardError, checked_reward, checked_rewards
from jaxft.rewards.confidence import (
    Confidence,
    answer_confidence,
    equivalence_classes,
    equivalent_answers,
    normalise_answer,
)
from jaxft.rewards.factuality import (
    Claim,
    ClaimExtractor,
    ConfidenceScorer,
    LMClaimExtractor,
    LMVerifier,
    PatternClaimExtractor,
    ReferenceScorer,
    ResponseScore,
    factual_pairs,
    score_responses,
    stated,
)
from jaxft.rewards.formats import tag_format_reward
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
from jaxft.rewards.resumable_texts import resumable
from jaxft.rewards.reward_models import model_rewards, prefix_verifier
from jaxft.rewards.several import SeveralRewards
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
    "Claim",
    "ClaimExtractor",
    "Confidence",
    "ConfidenceScorer",
    "Failures",
    "LMClaimExtractor",
    "LMVerifier",
    "OnFirstHost",
    "Outcome",
    "PatternClaimExtractor",
    "ProcessPool",
    "ReferenceScorer",
    "ResponseScore",
    "RewardError",
    "RewardFn",
    "SeveralRewards",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "accepted_answers",
    "answer_confidence",
    "answer_reward",
    "checked_reward",
    "checked_rewards",
    "equivalence_classes",
    "equivalent_answers",
    "factual_pairs",
    "in_process",
    "measure_accuracy",
    "mentions_answer",
    "model_rewards",
    "needs_mathematics",
    "normalise_answer",
    "numbers_equal",
    "prefix_verifier",
    "reasoning_gym_verifier",
    "resumable",
    "run_programs",
    "run_python",
    "same_answer",
    "score_responses",
    "stated",
    "stated_answer",
    "tag_format_reward",
    "verifier_for",
]
