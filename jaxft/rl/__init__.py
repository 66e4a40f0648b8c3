"""Verifiers and what is measured with them."""

from jaxft.rl.accuracy import Accuracy, measure_accuracy
from jaxft.rl.verifiers import (
    Verifier,
    mentions_answer,
    reasoning_gym_verifier,
    same_answer,
    verifier_for,
)

__all__ = [
    "Accuracy",
    "Verifier",
    "measure_accuracy",
    "mentions_answer",
    "reasoning_gym_verifier",
    "same_answer",
    "verifier_for",
]
