"""Renders records as tokens and loss masks. Masks come from structure, never from token ids."""

from __future__ import annotations

import dataclasses
import datetime
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxft.data.chat import NOTHING, Chat
from jaxft.data.encode import Encoder, in_span, touches
from jaxft.data.errors import DataError
from jaxft.data.media import MEDIA
from jaxft.data.media_rows import (
    MediaReader,
    Shown,
    check_kinds,
    expand,
    refuse_unread,
    without_placeholders,
)
from jaxft.data.records import Record, as_messages, context
from jaxft.data.shown import refuse
from jaxft.data.templates import (
    TEMPLATES,
    check_special,
    default_template,
    processor_template,
    read_template,
)

MaskMode = Literal["completion", "last_turn", "all", "per_message"]


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """One record as tokens."""

    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] float32, weight of each token as a target
    id: str = ""
    starts_with_bos: bool = False
    source: np.ndarray | None = None  # [S] int32 of an encoder-decoder; None: a decoder's record
    media: tuple[Shown, ...] = ()  # images and clips, in the order of their tokens

    def __getitem__(self, places: slice | np.ndarray) -> Tokenised:
        """Selects some of the tokens."""
        mask = self.loss_mask[places]
        return dataclasses.replace(self, tokens=self.tokens[places], loss_mask=mask)


class Renderer:
    """Renders records with a tokenizer and its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: a chat template that replaces the tokenizer's: a name (chatml, llama3, gemma,
            qwen3, alpaca, plain), a path, or Jinja text.
        mask: which tokens train: those of all assistant turns and completions, stop token
            included; those of the last assistant turn only; all; or "per_message", which excludes
            assistant turns with "train": false and scales by "weight" (completion and last_turn refuse
            weights). Assistant turns in a prompt are examples and train only with "all".
        train_on: a regular expression that restricts the mask to its matches (to group 1, if it has
            one), such as r"Answer: (.*)": a token counts if it overlaps a match. The stop token
            counts if a match reaches the end of the turn. None: no restriction.
        append_eos: ends plain completions and texts with the tokenizer's EOS.
        date: ISO date for templates that print the current date.
        template_options: further variables of the template, such as {"enable_thinking": False}.
        media: the processors of a model that reads images or audio; none: a text model, and records
            with images are refused.

    Raises:
        DataError: if the template cannot be used; without a template, at the first conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        mask: MaskMode = "completion",
        train_on: str | None = None,
        append_eos: bool = True,
        date: str = "2025-01-01",
        template_options: Mapping[str, Any] | None = None,
        media: Sequence[MediaReader] = (),
    ):
        if mask not in get_args(MaskMode):
            raise DataError(f"mask {mask!r} is not one of {', '.join(get_args(MaskMode))}.")
        self.tokenizer, self.mask, self.append_eos = tokenizer, mask, append_eos
        self.media = tuple(media)
        self._pattern = _compiled(train_on)
        self.merged_boundaries = (
            0  # boundaries that a token would have crossed; both sides encoded separately
        )
        self._encoder = Encoder(tokenizer)
        self._unrolls = False
        own = getattr(tokenizer, "chat_template", None)
        names = own if isinstance(own, dict) else {}
        text, needed = (names[template], ()) if template in names else read_template(template)
        bos = tokenizer.bos_token if self._encoder.adds_bos else None
        self.template = processor_template(text or default_template(own), self.media, bos)
        self._chat = self._tool_chat = None
        if self.template:
            check_special(tokenizer, needed, template)
            options = dict(template_options or {})
            if needed or template in TEMPLATES:
                # The named templates begin with BOS if the tokenizer itself would add one.
                options["bos_token"] = tokenizer.bos_token if self._encoder.adds_bos else ""
            today = datetime.date.fromisoformat(date)
            self._chat = Chat(tokenizer, self.template, today, options, self.media)
            self._probe()
            if text is None and "tool_use" in names:  # As transformers chooses.
                self._tool_chat = Chat(tokenizer, names["tool_use"], today, options, self.media)

    def __call__(self, record: Record) -> list[Tokenised]:
        """Renders a record: one sequence, or one per turn if the template rewrites history."""
        refuse_unread(record, self.media)
        messages = as_messages(record)
        if messages is not None:
            return self._conversation(messages, record)
        _refuse_tools(record)
        if "prompt" in record and "completion" in record:
            return [self._plain(record["prompt"], record["completion"], record)]
        if "text" in record:
            return [self._plain("", record["text"], record)]
        return [self._tokens(record)]

    def prompt(self, record: Record) -> list[int]:
        """Returns the ids of a prompt for generation: the conversation before its last assistant turn."""
        refuse_unread(record, self.media)
        messages = as_messages(record)
        if messages is None:
            _refuse_tools(record)
            text = record["prompt"] if "prompt" in record else record.get("text")
            if text is None:
                raise DataError(
                    "token ids have no prompt to answer; give text or messages.", "schema"
                )
            bos, text = self._bos(text), self._expanded(text, record.get(MEDIA) or ())
            return bos + self._encoder.encode(text)[0].tolist()
        alone = record.get("messages") is None and "completion" not in record
        if alone and messages[-1]["role"] == "assistant":  # not an answer, as in `messages`
            raise DataError(
                "the prompt ends with an assistant turn, which a sampled answer would have to continue; "
                "remove that turn, or give the prompt as plain text.",
                "role_order",
            )
        messages = _asked(messages)
        given = context(record)
        chat = self._need_chat(given)
        text = chat.text(messages, given, prompt=True)
        chat.check_prompt(messages, given, text)
        return self._encoder.encode(self._expanded(text, _media(messages)))[0].tolist()

    def shown(self, record: Record) -> tuple[Shown, ...]:
        """Returns the images and clips in a record's prompt, with the processors that load them."""
        messages = as_messages(record)
        media = record.get(MEDIA) or () if messages is None else _media(_asked(messages))
        check_kinds(media, self.media)
        readers = {reader.kind: reader for reader in self.media}
        return tuple(Shown(one, readers[one.kind]) for one in media)

    def next_turn(self, text: str) -> list[int]:
        """Returns the ids after an answer's stop token: a user turn `text` and the next answer's header.

        Appended to the ids of a conversation and its sampled answer, they form the next prompt without
        encoding the answer again: sampled text may not encode to the sampled tokens. Placeholders of images
        and clips are left out of `text`, because a reply has none.

        Raises:
            DataError: without a chat template, or if it renders earlier turns differently.
        """
        chat, before = self._need_chat(), self._example
        text = without_placeholders(text, self.media)
        rendered, spans = chat.spans(before)
        whole = chat.text([*before, {"role": "user", "content": text}], prompt=True)
        last = len(before) - 1
        end = (spans.get(last) or chat.span_by_content(rendered, before, {}, last))[1]
        if not whole.startswith(rendered[:end]):
            raise DataError(
                "the chat template renders an answer differently if a turn follows it, so a conversation "
                "cannot continue from its tokens; pass another with --template.",
                "template",
            )
        return self._encoder.encode(whole[end:])[0].tolist()

    def _conversation(self, messages, record):
        given = context(record)
        chat = self._need_chat(given)
        # Assistant turns in a prompt are given examples, not answers to learn.
        examples = 0 if record.get("messages") is not None else len(record["prompt"])
        turns = [i for i, m in enumerate(messages) if i >= examples and m["role"] == "assistant"]
        if self.mask == "all":
            text = chat.text(messages, given)
            refuse(chat.left_out(messages, given, text, turns))
            return [self._tokenised(text, {(0, len(text)): 1.0}, record, _media(messages))]
        if not turns:
            raise DataError(
                "no assistant message to learn from; see fields= to map roles.", "role_order"
            )
        if not self._unrolls:
            text, spans = chat.spans(messages, given)
            if all(i in spans for i in turns):
                trained = turns[-1:] if self.mask == "last_turn" else turns
                lost = chat.left_out(messages, given, text, trained)
                # Earlier turns may be complete when they are last.
                if not lost or any(piece.path[1] not in trained[:-1] for piece in lost):
                    refuse(lost)
                    return [self._masked(text, {i: spans[i] for i in turns}, messages, record)]
        return self._unrolled(messages, turns, record)

    def _unrolled(self, messages, turns, record):
        """Makes one record per turn, which ends with that turn, as at inference."""
        if len(turns) > 1 and not self._unrolls:
            self._unrolls = True
            warnings.warn(
                "the chat template rewrites earlier turns (for example, it drops thinking); each assistant "
                "turn becomes its own record, so that training sees the same text as sampling.",
                stacklevel=5,
            )
        turns, given = turns[-1:] if self.mask == "last_turn" else turns, context(record)
        chat, results = self._need_chat(given), []
        for i in turns:
            part = messages[: i + 1]
            text, spans = chat.spans(part, given)
            span = spans.get(i) or chat.span_by_content(text, part, given, i)
            if span is None:
                raise DataError(
                    f"the chat template renders the prompt of message {i} differently with its answer "
                    "than without; pass a template with {% generation %} markers.",
                    "template",
                )
            if self._weight(messages[i]) or len(turns) == 1:
                refuse(chat.left_out(part, given, text, (i,)))
                results.append(self._masked(text, {i: span}, part, record))
        return results

    def _masked(self, text, spans, messages, record):
        if self.mask == "last_turn":
            spans = {i: spans[i] for i in [max(spans)]}
        weights = {span: self._weight(messages[i]) for i, span in spans.items()}
        return self._tokenised(text, weights, record, _media(messages))

    def _weight(self, message):
        weight = float(message.get("weight", 1.0)) * (message.get("train") is not False)
        if self.mask != "per_message" and weight != 1:
            raise DataError(
                f"an assistant turn has weight {weight:g} (its 'weight', 'train' or 'loss'), which mask "
                f"{self.mask} does not honour; use --mask per_message, or all.",
                "schema",
            )
        return weight

    def _plain(self, prompt, completion, record):
        text = prompt + completion
        start = 0 if self.mask == "all" else len(prompt)
        media = record.get(MEDIA) or ()
        part = self._tokenised(text, {(start, len(text)): 1.0}, record, media)
        bos, eos = self._bos(text), self._eos(part.tokens)
        scale = _record_weight(record)
        scale *= any(end == len(text) for _, end in self._narrowed(text, start, len(text)))
        mask = np.concatenate([np.zeros(len(bos)), part.loss_mask, np.full(len(eos), scale)])
        tokens = np.concatenate([bos, part.tokens, eos])
        tokens, mask = tokens.astype(np.int32), mask.astype(np.float32)
        return Tokenised(tokens, mask, part.id, self._is_bos(tokens), media=part.media)

    def _expanded(self, text, media):
        return expand(text, {}, media, self.media).text

    def _tokenised(self, text, weights, record, media):
        text, weights, shown, places = expand(text, weights, media, self.media)
        cuts = [cut for span in weights for cut in span]
        ids, offsets, crossed = self._encoder.encode_apart(text, cuts)
        self.merged_boundaries += crossed
        mask = np.zeros(len(ids), np.float32)
        for (start, end), weight in weights.items():
            inside = in_span(offsets, start, end)
            if self._pattern is not None:
                parts = [touches(offsets, *part) for part in self._narrowed(text, start, end)]
                inside &= np.any([np.zeros(len(ids), bool), *parts], axis=0)
            mask[inside] = weight
        for place in places:  # no model is to say an image
            mask[touches(offsets, *place)] = 0
        mask *= _record_weight(record)
        return Tokenised(ids, mask, str(record.get("id", "")), self._is_bos(ids), media=shown)

    def _narrowed(self, text, start, end):
        """Returns the spans of text[start:end] that `train_on` matches; without a pattern, all."""
        if self._pattern is None:
            return [(start, end)]
        group = min(self._pattern.groups, 1)
        return [
            (start + match.start(group), start + match.end(group))
            for match in self._pattern.finditer(text[start:end])
            if match.start(group) >= 0
        ]

    def _tokens(self, record):
        tokens = np.asarray(record["tokens"], np.int64)
        vocab = max(self._encoder.vocab_size, len(self.tokenizer))
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise DataError(
                f"token ids must lie in [0, {vocab}), got {tokens.min()}..{tokens.max()}; were they "
                "made by another tokenizer?",
                "schema",
            )
        mask = np.asarray(record.get("loss_mask", np.ones(len(tokens))), np.float32)
        if mask.shape != tokens.shape:
            raise DataError(f"{len(mask)} loss_mask values for {len(tokens)} tokens.", "schema")
        mask = (mask * _record_weight(record)).astype(np.float32)
        return Tokenised(
            tokens.astype(np.int32), mask, str(record.get("id", "")), self._is_bos(tokens)
        )

    def _bos(self, text: str) -> list[int]:
        """Returns the BOS that the tokenizer would add, unless the text begins with it."""
        encoder = self._encoder
        if not encoder.adds_bos or text.startswith(self.tokenizer.bos_token):
            return []
        return [encoder.bos]

    def _is_bos(self, tokens) -> bool:
        return self._encoder.bos is not None and tokens[:1].tolist() == [self._encoder.bos]

    def _eos(self, tokens) -> list[int]:
        if not self.append_eos:
            return []
        if self._encoder.eos is None:
            raise DataError("the tokenizer has no EOS token; pass append_eos=False.")
        return [] if tokens[-1:].tolist() == [self._encoder.eos] else [self._encoder.eos]

    def _need_chat(self, given=NOTHING):
        """Returns the chat template for conversations with or without tools."""
        if given.get("tools") and self._tool_chat is not None:
            return self._tool_chat
        if self._chat is None:
            raise DataError(
                "the tokenizer has no chat template; use an instruct model, pass --template with "
                "a name (chatml, llama3, gemma, qwen3, alpaca, plain) or the path of a Jinja "
                "template, or give records with text prompt and completion."
            )
        return self._chat

    def _probe(self):
        """Renders a small conversation, so that an unusable template fails at once."""
        messages = [
            {"role": "user", "content": "Say one."},
            {"role": "assistant", "content": "One."},
        ]
        try:
            self._chat.spans(messages)
        except DataError:  # Some templates require a system message.
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        last = len(messages) - 1
        try:
            text, spans = self._chat.spans(messages)
            span = spans.get(last) or self._chat.span_by_content(text, messages, {}, last)
        except DataError as error:
            raise DataError(f"chat template, tried on a small conversation: {error}") from error
        if span is None or "One." not in text[slice(*span)]:
            raise DataError(
                "cannot find the assistant's turn in the text of the chat template, so nothing "
                "would train; put {% generation %} ... {% endgeneration %} around it."
            )
        self._example = messages
        ids = self._encoder.encode(text)[0]
        if self._encoder.bos != self._encoder.eos and (ids[:2] == self._encoder.bos).sum() == 2:
            raise DataError("the chat template begins with two BOS tokens; remove one.")


def _asked(messages):
    """The conversation before its last answer."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _media(messages):
    """The images and clips of a conversation."""
    return [one for message in messages for one in message.get(MEDIA, ())]


def _compiled(pattern):
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise DataError(f"train_on {pattern!r} is not a regular expression: {error}.") from error


def _refuse_tools(record):
    if context(record).get("tools"):
        raise DataError(
            "'tools' beside plain text cannot be shown; give messages, or leave them out with --fields "
            "tools '', in Python fields={'tools': ''}.",
            "schema",
        )


def _record_weight(record):
    weight = record.get("weight")
    return 1.0 if weight is None else float(weight)
