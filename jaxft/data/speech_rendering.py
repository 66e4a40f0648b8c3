"""Renders clips and their texts for models such as Whisper, whose encoder reads the clip."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from jaxft.checkpoints import resolve
from jaxft.data.clips import ClipReader
from jaxft.data.errors import DataError
from jaxft.data.log_mel import read_log_mel
from jaxft.data.media import media_in, without_markers
from jaxft.data.media_rows import Shown, check_kinds
from jaxft.data.records import Record, as_messages
from jaxft.data.rendering import Tokenised
from jaxft.data.source_rendering import check_settings
from jaxft.models import EncoderDecoderConfig, speech_begin


class SpeechRenderer:
    """Renders records of one clip and its text: a column `audio` beside `text`, or the answer to the clip.

    The decoder's text is the model's first ids, which do not train, a space and the text, as in Whisper's
    training, and the tokenizer's end. The clip is the only entry of the row's column `source`.

    Args:
        tokenizer: a transformers tokenizer.
        config: of the model.
        reader: of its clips.
        language: a code such as "de", for models of several languages whose files name none.
        task: "transcribe" or "translate"; None: that of the files.
        template, mask, train_on: see `SourceRenderer`.

    Raises:
        DataError: for settings that the model lacks, a language that must be named, or a tokenizer without
            an end.
    """

    template = None
    merged_boundaries = 0  # nothing is encoded before the text

    def __init__(
        self,
        tokenizer: Any,
        config: EncoderDecoderConfig,
        reader: ClipReader,
        *,
        language: str | None = None,
        task: str | None = None,
        template: str | None = None,
        mask: str = "completion",
        train_on: str | None = None,
    ):
        check_settings(tokenizer, config, template, mask, train_on)
        self.tokenizer, self.config, self.reader, self.mask = tokenizer, config, reader, mask
        try:
            self.begin = speech_begin(config, language, task)
        except ValueError as error:
            raise DataError(str(error)) from None

    def __call__(self, record: Record) -> list[Tokenised]:
        """Renders a record as one sequence."""
        (shown,) = self.shown(record)
        text = _text(record)
        if not text.strip():
            raise DataError("the text of the clip is empty.", "empty_completion")
        self.reader.text(shown.media)  # reads the clip, so that a damaged one is an error now
        begin = self._known()
        ids = self.tokenizer.encode(f" {text.strip()}", add_special_tokens=False)
        tokens = np.array([*begin, *ids, self.tokenizer.eos_token_id], np.int32)
        weight = record.get("weight")
        mask = np.full(len(tokens), 1.0 if weight is None else float(weight), np.float32)
        mask[: len(begin)] = 0
        return [Tokenised(tokens, mask, str(record.get("id", "")), media=(shown,))]

    def prompt(self, record: Record) -> list[int]:
        """Returns the ids with which the decoder's text begins."""
        (shown,) = self.shown(record)
        self.reader.text(shown.media)
        return self._known()

    def shown(self, record: Record) -> tuple[Shown, ...]:
        """Returns the clip of a record, with the processor that loads it."""
        media = media_in(record)
        check_kinds(media, (self.reader,))
        if len(media) != 1:
            raise DataError(
                f"the record has {len(media)} clips, expected one in the column 'audio'; with another name: "
                "--fields audio NAME.",
                "schema",
            )
        return (Shown(media[0], self.reader),)

    def _known(self):
        if None in self.begin:
            raise DataError(
                f"{self.config.family}: the model knows several languages and its files name none; choose "
                "one: --language, in Python language=."
            )
        return self.begin


def speech_renderer(
    model: str | os.PathLike,
    tokenizer: Any,
    config: EncoderDecoderConfig,
    *,
    resample: bool = False,
    mix: bool = False,
    **options: Any,
) -> SpeechRenderer:
    """The renderer of a model's directory, name or hub id, with the features that its files ask for.

    Args:
        resample, mix: see `ClipReader`.
        options: of `SpeechRenderer`.
    """
    features = read_log_mel(resolve(model), config.mel, config.source_places)
    reader = ClipReader(features, resample=resample, mix=mix)
    return SpeechRenderer(tokenizer, config, reader, **options)


def _text(record):
    """The text of a record's clip: `text` or `completion`, or the answer in messages."""
    messages = as_messages(record)
    if messages is None:
        names = ("completion", "text")
        text = next((record[name] for name in names if record.get(name) is not None), "")
        asked = record.get("prompt") or ""
    else:
        turns = [(message["role"], message["content"]) for message in messages]
        if [role for role, _ in turns] not in (["user"], ["user", "assistant"]):
            raise DataError(
                f"a clip has one text: expected a user message with the clip and one answer, got "
                f"{[role for role, _ in turns]}.",
                "role_order",
            )
        asked, text = turns[0][1], turns[1][1] if len(turns) == 2 else ""
    if beside := "".join(without_markers(asked, ("audio",))):
        raise DataError(
            f"the question {beside!r:.40} stands beside the clip, which is all that the encoder reads; leave "
            "it out.",
            "schema",
        )
    return "".join(without_markers(text, ("audio",)))
