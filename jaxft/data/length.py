"""Handling of records that are longer than the model's window."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

TooLong = Literal["drop", "truncate", "truncate_left_prompt", "split", "error"]


def shorten(part: Any, max_length: int, too_long: TooLong) -> list[Any]:
    """Shortens or splits a Tokenised; each result has at least one token that trains.

    Masks are cut after they are computed, so a truncated turn keeps the rest of its mask.
    """
    if too_long == "drop":
        cut = []
    elif too_long == "truncate":
        cut = [part[:max_length]]
    elif too_long == "truncate_left_prompt":
        cut = [part[keep_answer(part, max_length)]]
    elif too_long == "split":
        cut = [part[i : i + max_length] for i in range(0, len(part.tokens), max_length)]
    else:
        raise ValueError(f"too_long={too_long!r}; expected one of {TooLong.__args__}.")
    return [piece for piece in cut if piece.loss_mask[1:].any()]


def keep_answer(part: Any, max_length: int, surplus: int | None = None) -> np.ndarray:
    """Indices of BOS, the end of the prompt and the answer, which is cut on the right if necessary.

    `surplus` tokens of the prompt are removed, by default as many as exceed max_length, but at least one
    remains, from which the answer's first token is predicted.
    """
    surplus = len(part.tokens) - max_length if surplus is None else surplus
    head = 1 if part.starts_with_bos else 0
    answer = int(np.argmax(part.loss_mask > 0))
    start = max(head, min(surplus + head, answer - 1 + head))
    places = np.concatenate([np.arange(head), np.arange(start, len(part.tokens))])
    return places[:max_length]
