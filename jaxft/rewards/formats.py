"""Rewards for the form of a response, and rewards made of several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.prior_prompts import check_tag
from jaxft.rewards.checked import checked_rewards
from jaxft.rewards.pool import RewardFn


def tag_format_reward(tags: Sequence[str]) -> RewardFn:
    """Returns a reward: 1 for <a> ... </a> <b> ... </b> of these tags in their order, else 0.

    Each opening and closing tag must occur once, and only white space may be outside the pairs or between
    them. Taveekitworachai et al., 2025, arxiv.org/abs/2505.14157: "think" or another, then "answer".

    Raises:
        ValueError: for no tags, two that are equal, or one that is not a plain word.
    """
    if not tags or len(set(tags)) < len(tags):
        raise ValueError(f"tag_format_reward: needs different tags, at least one, got {tags}.")
    for tag in tags:
        check_tag(tag)
    whole = re.compile(r"\s*".join(["", *(rf"<{tag}>.*?</{tag}>" for tag in tags), ""]), re.DOTALL)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def fits(text: str) -> bool:
        return all(text.count(mark) == 1 for mark in marks) and bool(whole.fullmatch(text))

    def reward(completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(fits(text)) for text in completions]

    return reward


def weighted_rewards(*parts: tuple[float, RewardFn]) -> RewardFn:
    """Returns the reward Σ w_i r_i of pairs (w_i, r_i); without a verdict of one part there is none (NaN).

    Raises:
        ValueError: for weights that are negative, not finite, or all 0.
        RewardError: when called, for a part that does not return one number per completion.
    """
    weights = [weight for weight, _ in parts]
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(
            f"weighted_rewards: weights must be finite, at least 0 and not all 0, got {weights}."
        )

    def reward(completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        values = [
            checked_rewards(part(completions, records), len(completions)) for _, part in parts
        ]
        return sum(w * np.asarray(value) for w, value in zip(weights, values, strict=True))

    return reward
