"""Renders records for encoder-decoders: the prompt is the encoder's source, the answer the decoder's text."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.media import media_in
from jaxft.data.media_rows import check_kinds
from jaxft.data.records import Record, as_messages, context
from jaxft.data.rendering import Tokenised
from jaxft.models import EncoderDecoderConfig


class SourceRenderer:
    """Renders records of one question and its answer with the special tokens of the tokenizer's own model.

    The source is the tokenizer's encoding of the prompt and the answer that of a target text: T5's end with
    </s>, BART's stand between <s> and </s>, mBART's have the ids of their languages (`src_lang` and
    `tgt_lang` of the tokenizer). The decoder's text begins with the model's `decoder_start_token_id` or, for
    mBART, with the target's last id, as in transformers.

    Args:
        tokenizer: a transformers tokenizer, fast or not.
        config: of the model.
        template: must be None: these models have no chat templates.
        mask: which tokens train; the answer's do with "completion" and "last_turn", others are refused.
        train_on: must be None.

    Raises:
        DataError: for settings that an encoder-decoder lacks, or a tokenizer or model without the ids.
    """

    template = None
    merged_boundaries = 0  # prompt and answer are encoded apart

    def __init__(
        self,
        tokenizer: Any,
        config: EncoderDecoderConfig,
        *,
        template: str | None = None,
        mask: str = "completion",
        train_on: str | None = None,
    ):
        check_settings(tokenizer, config, template, mask, train_on)
        self.tokenizer, self.config, self.mask = tokenizer, config, mask
        # As in transformers, whose mBART shifts its targets in a circle: the language, or </s> of mBART-50.
        self._from_target = config.family == "mbart"
        if not self._from_target and config.decoder_start is None:
            raise DataError(
                f"{config.family}: neither generation_config.json nor config.json has a "
                "decoder_start_token_id, the id that begins an answer; add it."
            )

    def __call__(self, record: Record) -> list[Tokenised]:
        """Renders a record as one sequence with its source."""
        source, answer = self._texts(record)
        return [self.sequence(self._source(source), self._target(answer), record)]

    def sequence(self, source: list[int], labels: list[int], record: Record) -> Tokenised:
        """Returns the sequence of a source and of the decoder's targets, special ids included in both."""
        start = labels[-1] if self._from_target else self.config.decoder_start
        tokens = np.array([start, *labels], np.int32)
        weight = record.get("weight")
        mask = np.full(len(tokens), 1.0 if weight is None else float(weight), np.float32)
        mask[0] = 0  # nothing predicts it
        source = np.array(source, np.int32)
        return Tokenised(tokens, mask, str(record.get("id", "")), source=source)

    def prompt(self, record: Record) -> list[int]:
        """Returns the ids of a record's source, which `generate` gives to the encoder."""
        return self._source(self._texts(record, answered=False)[0])

    def _source(self, text):
        ids = _unpadded(self.tokenizer(text))
        if not ids:
            raise DataError(
                f"the prompt {text!r:.40} has no token, so the encoder would read nothing.",
                "schema",
            )
        return ids

    def _target(self, text):
        # transformers takes the source's language if there is no other.
        if self._from_target and getattr(self.tokenizer, "tgt_lang", None) is None:
            raise DataError(
                f"{self.config.family}: the tokenizer has no tgt_lang, the language of the answers; set "
                "src_lang and tgt_lang in tokenizer_config.json."
            )
        return _unpadded(self.tokenizer(text_target=text))

    def _texts(self, record, answered=True):
        """(prompt, answer or None) of a record with one of each."""
        if context(record).get("tools"):
            raise DataError(
                "'tools' cannot be shown to an encoder-decoder; leave them out.", "schema"
            )
        check_kinds(media_in(record), ())
        messages = as_messages(record)
        if messages is None:
            prompt, answer = record.get("prompt"), record.get("completion")
            if prompt is None and not answered:
                prompt = record.get("text")
            if prompt is None or (answered and answer is None):
                raise DataError(
                    "an encoder-decoder reads a prompt and writes its completion; the record has "
                    f"{', '.join(sorted(name for name in record if not name.startswith('_')))}.",
                    "schema",
                )
        else:
            roles = [message["role"] for message in messages]
            if roles[:1] != ["user"] or roles[1:] not in ([], ["assistant"]):
                raise DataError(
                    f"an encoder-decoder reads one user message and writes one answer, got {roles}; put a "
                    "system message or earlier turns into the prompt's text.",
                    "role_order",
                )
            prompt = messages[0]["content"]
            answer = messages[1]["content"] if len(messages) == 2 else None
            if answered and answer is None:
                raise DataError("no assistant message to learn from.", "role_order")
        if not prompt.strip():
            raise DataError("the prompt is empty, so the encoder would read nothing.", "schema")
        return prompt, answer


def check_settings(
    tokenizer: Any,
    config: EncoderDecoderConfig,
    template: str | None,
    mask: str,
    train_on: str | None,
) -> None:
    """Raises DataError for settings of a renderer that encoder-decoders lack, or a tokenizer without EOS."""
    for name, value in (("template", template), ("train_on", train_on)):
        if value is not None:
            raise DataError(
                f"{name}={value!r} does not apply to {config.family}, an encoder-decoder: its encoder "
                "reads the prompt and its whole answer trains; leave it out."
            )
    if mask not in ("completion", "last_turn"):
        raise DataError(
            f"mask {mask!r} does not apply to {config.family}, an encoder-decoder: the prompt is the "
            "encoder's and no target; use completion."
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, at which an answer would end.")


def _unpadded(encoded) -> list[int]:
    return list(encoded["input_ids"])
