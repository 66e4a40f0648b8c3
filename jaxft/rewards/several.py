"""Several reward functions of one answer, added with weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.rewards.checked import checked_rewards
from jaxft.rewards.pool import Failures, RewardFn


@dataclasses.dataclass(frozen=True)
class SeveralRewards:
    """A RewardFn: Σ_k w_k r_k, without the r_k that have no verdict; NaN where none has one.

    `rl.answers` also keeps the r_k themselves, which `rl.normalised_sums` reads. TRL's reward_weights.

    Args:
        functions: each (completions, records) -> one number each.
        weights: w, one for each function.

    Raises:
        ValueError: without functions, or for another number of weights, or one that is not finite.
    """

    functions: Sequence[RewardFn]
    weights: Sequence[float]

    def __post_init__(self):
        if not self.functions or len(self.functions) != len(self.weights):
            raise ValueError(
                f"SeveralRewards: {len(self.functions)} reward functions and {len(self.weights)} weights; "
                "give one weight for each function."
            )
        if not np.isfinite(self.weights).all():
            raise ValueError(f"SeveralRewards: weights must be finite, got {self.weights}.")

    @property
    def failures(self) -> Failures:
        """Numbers of calls of all functions that failed so far in this process."""
        each = [getattr(function, "failures", Failures()) for function in self.functions]
        return Failures(*map(sum, zip(*each, strict=True)))

    def __call__(
        self, completions: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Returns the weighted sums [B]."""
        return weighted_sums(self.parts(completions, records), self.weights)

    def parts(self, completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Returns the reward of each function, [B, K] float32, NaN where it has no verdict."""
        count = len(completions)
        each = [checked_rewards(f(completions, records), count) for f in self.functions]
        return np.stack(each, axis=1)


def weighted_sums(parts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Σ_k w_k r_k of rewards [B, K] over those that are not NaN, [B] float32; NaN where all are."""
    sums = np.nansum(np.asarray(parts) * np.asarray(weights, np.float32), axis=1)
    return np.where(np.isnan(parts).all(axis=1), np.nan, sums).astype(np.float32)
