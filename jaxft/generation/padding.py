"""Pads prompts and columns to few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_BUCKET = 16


def left_pad(prompts: Sequence[Sequence[int]], config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, valid) [B, P]: left-padded prompts, with rows and width rounded up to buckets."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError("generate: every prompt needs at least one token.")
    check_ids(prompts, getattr(config, "vocab_size", None))
    width = min(bucket(max(lengths), MIN_BUCKET), config.max_length)
    width = max(width, max(lengths))
    tokens = np.zeros((bucket(len(prompts), 1), width), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        valid[i, width - len(prompt) :] = True
    return tokens, valid


def check_ids(prompts, size):
    """Raises for ids outside of the embedding, which would become NaN and give an empty completion."""
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if size is not None and not 0 <= low <= high < size:
        raise ValueError(
            f"generate: prompts have ids {low}..{high}, but the model's embedding has {size} rows; use the "
            "tokenizer that belongs to the model."
        )


def padded(name: str, column: Any, rows: int, size: int) -> np.ndarray:
    """Pads the column of `rows` prompts with rows of zeros to `size` rows."""
    column = np.asarray(column)
    if column.shape[:1] != (rows,):
        raise ValueError(
            f"generate: column {name!r} has shape {column.shape} for {rows} prompts; give one row for each."
        )
    return np.pad(column, [(0, size - rows)] + [(0, 0)] * (column.ndim - 1))


def bucket(size: int, least: int) -> int:
    """Smallest power of two, or three quarters of one, that is at least `size`."""
    power = max(least, 1 << (size - 1).bit_length())
    return power * 3 // 4 if power > least and size <= power * 3 // 4 else power
