"""Checks the results of user reward functions: numbers, or one error that shows the bad value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np


class RewardError(ValueError):
    """A reward function or judge returned no reward; names the value and what was expected."""


def checked_rewards(rewards: Any, count: int) -> np.ndarray:
    """The rewards of `count` completions as an array [count] of float32, NaN where there is no verdict.

    Lists, tuples and arrays of NumPy and JAX with one axis are accepted; `checked_reward` reads
    their items.

    Raises:
        RewardError: for anything else, with its shape or the first item that is not a reward.
    """
    expected = f"it must return {count} numbers, one for each completion, in their order"
    if rewards is None or isinstance(rewards, (str, bytes, Mapping)) or not np.iterable(rewards):
        raise RewardError(f"the reward function returned {shown(rewards)}; {expected}.")
    shape = tuple(getattr(rewards, "shape", ()))
    if len(shape) > 1:
        raise RewardError(f"the reward function returned an array of shape {shape}; {expected}.")
    items = list(np.asarray(rewards) if shape else rewards)
    if len(items) != count:
        raise RewardError(
            f"the reward function returned {len(items)} rewards for {count} completions; {expected}."
        )
    values = np.empty(count, np.float32)
    for i, item in enumerate(items):
        try:
            values[i] = checked_reward(item)
        except RewardError as error:
            raise RewardError(f"the reward function's item {i} of {count}: {error}") from None
    return values


def checked_reward(value: Any) -> float:
    """A number, a truth value, or a scalar of NumPy or JAX as a float; NaN, no verdict, for None and NaN.

    Raises:
        RewardError: for anything else, such as text or an array with axes, and for infinite numbers.
    """
    if value is None:
        return math.nan
    dtype = getattr(value, "dtype", None)
    scalar = (
        dtype is not None and getattr(value, "shape", None) == () and dtype.kind not in "cSUOMm"
    )
    if not isinstance(value, (numbers.Real, np.bool_)) and not scalar:
        raise RewardError(
            f"{shown(value)} is not a reward; expected a number, or None for no verdict."
        )
    number = float(value)
    if math.isinf(number):
        raise RewardError(
            f"an infinite reward ({number}); expected a number, or None for no verdict."
        )
    return number


def shown(value: Any, limit: int = 60) -> str:
    """A value with its type, and its shape if it has one, on one short line."""
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    kind = type(value).__name__ + (f" of shape {tuple(shape)}" if shape else "")
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= limit else text[: limit - 3] + '...'} ({kind})"
