"""Handling of records that are longer than the model's window."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from jaxft.data.errors import DataError

TooLong = Literal["drop", "truncate", "truncate_left_prompt", "split", "error"]


def shorten(part: Any, max_length: int, too_long: TooLong) -> list[Any]:
    """Shortens or splits a Tokenised; each result has at least one token that trains.

    Masks are cut after they are computed, so a truncated turn keeps the rest of its mask. A record with
    images or clips is dropped instead.
    """
    if part.media:
        return []  # A cut could part an image from some of its tokens.
    if part.source is not None:
        return _shorten_both(part, max_length, too_long)
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


def longest(part: Any) -> int:
    """Tokens of a Tokenised; for an encoder-decoder, of its source or its answer."""
    return max(len(part.tokens), 0 if part.source is None else len(part.source))


def _shorten_both(part, max_length, too_long):
    """Cuts source and answer of an encoder-decoder's record on the right; keeps the source's last token.

    It ends the source for the model: </s>, or a language's id.
    """
    if too_long == "drop":
        return []
    if too_long != "truncate":
        raise DataError(
            f"too_long={too_long!r} does not apply to an encoder-decoder's source and answer; choose drop, "
            "truncate or error."
        )
    source = part.source
    if len(source) > max_length:
        source = np.concatenate([source[: max_length - 1], source[-1:]])
    return [dataclasses.replace(part[:max_length], source=source)]


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
