"""Renders plain texts for denoising pretraining of encoder-decoders."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from jaxft.data.denoising import Noise, denoise
from jaxft.data.errors import DataError
from jaxft.data.media import media_in
from jaxft.data.media_rows import check_kinds
from jaxft.data.records import Record
from jaxft.data.rendering import Tokenised
from jaxft.data.source_rendering import SourceRenderer
from jaxft.models import EncoderDecoderConfig


class DenoisingRenderer:
    """Renders the `text` of a record as pieces: a corrupted source, and the target that restores it.

    Source and target have the special tokens of the tokenizer's own texts. The noise of a piece depends only
    on the seed and its tokens: neither the order of records nor resuming changes it, and every epoch has the
    same.

    Args:
        tokenizer: a transformers tokenizer, fast or not.
        config: of the model.
        noise: such as `span_corruption(sentinel_ids(tokenizer))` for T5, `text_infilling(mask_id)` for BART.
        length: the most tokens of a piece, without special tokens. For T5: `longest_text`.
        seed: of the draws.

    Raises:
        DataError: see `SourceRenderer`; for a length below 2.
    """

    template = None
    merged_boundaries = 0  # texts are encoded whole

    def __init__(
        self,
        tokenizer: Any,
        config: EncoderDecoderConfig,
        noise: Noise,
        *,
        length: int,
        seed: int = 0,
    ):
        if length < 2:
            raise DataError(f"a piece has at most {length} tokens; expected at least 2.")
        self.tokenizer, self.config, self.noise = tokenizer, config, noise
        self.length, self.seed = length, seed
        self._rows = SourceRenderer(tokenizer, config)
        self._before, self._after = _frame(tokenizer)

    def __call__(self, record: Record) -> list[Tokenised]:
        """Renders a record as one sequence for each piece of its text."""
        check_kinds(media_in(record), ())
        text = record.get("text")
        if not isinstance(text, str):
            raise DataError(
                "denoising pretraining reads plain texts; the record has no 'text' but "
                f"{', '.join(sorted(name for name in record if not name.startswith('_')))}.",
                "schema",
            )
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        pieces = [ids[i : i + self.length] for i in range(0, len(ids), self.length)]
        # A token has no neighbours to be restored from.
        return [self._piece(piece, record) for piece in pieces if len(piece) > 1]

    def prompt(self, record: Record) -> list[int]:
        """Raises DataError: a text to restore has no prompt."""
        raise DataError("texts for denoising pretraining have no prompt to answer.")

    def _piece(self, piece, record):
        noisy = denoise(self.noise, self.seed, zlib.crc32(piece.tobytes()), piece)
        framed = lambda ids: [*self._before, *ids.tolist(), *self._after]
        return self._rows.sequence(framed(noisy["source"]), framed(noisy["target"]), record)


def _frame(tokenizer):
    """The special ids before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("a")["input_ids"])
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == list(plain):
            return whole[:i], whole[i + len(plain) :]
    raise DataError("the tokenizer changes a text's own ids where it adds special ones.")
