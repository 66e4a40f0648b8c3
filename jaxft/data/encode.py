"""Encodes text as token ids with their character offsets."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.data.errors import DataError


class Encoder:
    """A private copy of a fast tokenizer that adds no special tokens.

    It is private because padding and truncation are shared state of a tokenizer, and because
    a post-processor would trim whitespace from the offsets (GPT-2's and Llama 3's do).
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so it cannot give the tokens' "
                "offsets in the text; save it with a tokenizer.json."
            )
        with_special = tokenizer("a")["input_ids"]
        self.adds_bos = with_special[:1] == [tokenizer.bos_token_id]
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Pieces of a text must not get the space that SentencePiece prepends to a text.
        self._core = copy.deepcopy(tokenizer).backend_tokenizer
        self._core.post_processor = None
        self._core.no_padding()
        self._core.no_truncation()
        self._newline = self._core.encode("\n", add_special_tokens=False).ids
        tokens = self._core.encode("a", add_special_tokens=False).tokens
        self._prefixes = bool(tokens) and tokens[0].startswith(("\u2581", "\u0120"))
        self._lock = threading.Lock()

    @property
    def vocab_size(self) -> int:
        return self._core.get_vocab_size()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids [T], character offsets [T, 2])."""
        try:
            with self._lock:
                encoded = self._core.encode(text, add_special_tokens=False)
        except TypeError:
            raise DataError(
                "text with an unpaired surrogate, which is not Unicode.", "encoding"
            ) from None
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        return np.asarray(encoded.ids, np.int32), offsets

    def encode_apart(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns (ids, offsets, number of cuts that a token would have crossed); no token crosses a cut.

        The text is encoded as a whole, as a sampler encodes a conversation. Only if a token would
        cross a cut are the sides encoded separately, as a sampler sees prompt and completion.
        """
        ids, offsets = self.encode(text)
        inside = lambda cut: ((offsets[:, 0] < cut) & (cut < offsets[:, 1])).any()
        crossed = [cut for cut in cuts if inside(cut)]
        if not crossed:
            return ids, offsets, 0
        bounds = [0, *sorted(set(crossed)), len(text)]
        pieces = [self._piece(text, a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        ids, offsets = (np.concatenate(side) for side in zip(*pieces, strict=True))
        return ids, offsets, len(crossed)

    def _piece(self, text, start, end):
        if start and self._prefixes:
            ids, offsets = self.encode("\n" + text[start:end])
            count = len(self._newline)
            if ids[:count].tolist() == self._newline:
                return ids[count:], np.maximum(offsets[count:] - 1, 0) + start
        ids, offsets = self.encode(text[start:end])
        return ids, offsets + start


def in_span(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """Returns which tokens lie in text[start:end]."""
    begins, ends = offsets[:, 0], offsets[:, 1]
    return (begins >= start) & (begins < end) & (ends <= end)


def touches(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """Returns which tokens share a character with text[start:end]."""
    return (offsets[:, 0] < end) & (offsets[:, 1] > start)
