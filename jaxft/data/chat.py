"""Converts conversations to text with the spans of the assistant's turns."""

from __future__ import annotations

import datetime
import functools
import json
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxft.data.errors import DataError
from jaxft.data.media import MARKERS, MEDIA, Media, as_parts
from jaxft.data.shown import Piece, left_out, refuse

Span = tuple[int, int]  # characters [start, end)
NOTHING: Mapping[str, Any] = types.MappingProxyType({})

_SENTINEL = "\ue000jaxft\ue001"  # private-use characters, which occur in no text
# An empty thinking block that the template inserted.
_EMPTY_THINKING = re.compile(r"\s*<(think|thinking)>\s*</\1>\n*")
# Errors of templates that expect other messages.
_REFUSALS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    RecursionError,
    OverflowError,
)
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class Chat:
    """A chat template with its tokenizer's special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        template: Jinja text.
        date: the date that templates print instead of today's, so that data do not change daily.
        options: further variables of the template, such as {"enable_thinking": False}.
        media: the `MediaReader`s of a model that reads images or audio.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        date: datetime.date,
        options: Mapping,
        media: Sequence[Any] = (),
    ):
        self._tokenizer, self._options = tokenizer, dict(options)
        self.template = _NOW.sub(lambda m: repr(date.strftime(m[2])), template)
        if "date_string" in template:
            self._options.setdefault("date_string", date.strftime("%d %b %Y"))
        self.has_markers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        special = "|".join(re.escape(t) for t in sorted(names, key=len, reverse=True))
        self._stop = re.compile(rf"\s*(?:{special})") if special else None
        self._tail = re.compile(rf"(?:{special})(\s+)$") if special else None
        # Templates of models that read media take contents in parts; others may take text with markers.
        self._parts = bool(media)  # first as if it took parts, to try it
        self._parts = self._parts and self._shows_parts(media)

    def text(
        self, messages: Sequence[Mapping], given: Mapping = NOTHING, *, prompt: bool = False
    ) -> str:
        """Renders the conversation as text.

        Args:
            given: `tools`, and further variables of the template.
            prompt: append the header of the next answer.
        """
        return self._render(messages, given, prompt)[0]

    def left_out(
        self, messages: Sequence[Mapping], given: Mapping, text: str, trained: Collection[int]
    ) -> list[Piece]:
        """Returns the parts of the messages and tools that their rendered `text` does not show."""
        return left_out(self.text, messages, given, text, trained)

    def check_prompt(self, messages: Sequence[Mapping], given: Mapping, text: str) -> None:
        """Raises DataError for parts of the messages that the text of a prompt omits."""
        refuse(left_out(functools.partial(self.text, prompt=True), messages, given, text, ()))

    def spans(
        self, messages: Sequence[Mapping], given: Mapping = NOTHING
    ) -> tuple[str, dict[int, Span]]:
        """Returns (text, {message index: span}) for each assistant message that is found in the text.

        A span is the text that a sampler would produce after the preceding text, stop token included.
        """
        text, marked = self._render(messages, given, False, self.has_markers)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.has_markers:
            marked = [(a, b) for a, b in marked if b > a]
            if len(marked) != len(turns):
                raise DataError(
                    f"the chat template's generation markers enclose {len(marked)} of "
                    f"{len(turns)} assistant turns; correct the template.",
                    "template",
                )
            found = dict(zip(turns, marked, strict=True))
        else:
            found = {i: self._by_prefix(text, messages, given, i) for i in turns}
        return text, {i: self._finish(text, s, messages[i]) for i, s in found.items() if s}

    def span_by_content(
        self, text: str, messages: Sequence[Mapping], given: Mapping, i: int
    ) -> Span | None:
        """Span of message i's content: the text that changes if a sentinel replaces it."""
        changed = [*messages]
        changed[i] = {**messages[i], "content": _SENTINEL}
        try:
            other = self.text(changed, given)
        except DataError:
            return None
        start = other.find(_SENTINEL)
        after = other[start + len(_SENTINEL) :]
        if not messages[i]["content"] and i == len(messages) - 1 and start >= 0:
            # Only tool calls: they follow the place of the content, possibly after whitespace.
            begin = len(text) - len(after.lstrip())
            fits = text.endswith(after.lstrip()) and not text[start:begin].strip()
            return self._finish(text, (begin, len(text)), messages[i]) if fits else None
        end = len(text) - len(after)
        if start < 0 or end <= start or text[:start] != other[:start] or not text.endswith(after):
            return None
        return self._finish(text, (start, end), messages[i])

    def _by_prefix(self, text, messages, given, i):
        """Span of the text after the rendering of the messages before i with the answer's header."""
        if i == 0:  # Templates refuse an empty conversation.
            return self.span_by_content(text, messages, given, i)
        before = self.text(messages[:i], given, prompt=True)
        last = i == len(messages) - 1
        after = text if last else self.text(messages[: i + 1], given)
        if not (text.startswith(after) and after.startswith(before)):
            return None
        if before == self.text(messages[:i], given):
            # If the prompt adds no header, the turn's own may be part of the span. A blank is not
            # a header: that of Llama 2 and Mistral is part of the answer's first token.
            inner = self.span_by_content(text, messages, given, i)
            if inner and text[len(before) : inner[0]].strip():
                return inner
        return len(before), len(after)

    def _finish(self, text, span, message):
        """Adjusts the span: removes text that no model produces, and includes the stop token."""
        start, end = span
        thinks = message.get("reasoning_content") or message["content"].lstrip().startswith(
            "<think"
        )
        empty = None if thinks else _EMPTY_THINKING.match(text, start, end)
        start = empty.end() if empty else start
        tail = self._tail and self._tail.search(text, start, end)
        if tail:  # blanks after the stop token
            return start, tail.start(1)
        ended = self._stop and re.search(rf"(?:{self._stop.pattern})$", text[start:end])
        stop = None if ended or not self._stop else self._stop.match(text, end)
        return start, stop.end() if stop else end

    def _render(self, messages, given, prompt, marks=False):
        if any(message.get("tool_calls") for message in messages) and self._text_arguments:
            messages = [_with_text_arguments(message) for message in messages]
        return self._rendered(messages, given, prompt, marks)

    def _shows_parts(self, media):
        """Returns whether the template writes the parts of a content as text and placeholders."""
        marked = "".join(MARKERS[reader.kind] for reader in media)
        held = tuple(Media(reader.kind, "") for reader in media)
        asked = {"role": "user", "content": f"{marked}Say one.", MEDIA: held}
        try:
            text = self._rendered([asked], NOTHING, False)[0]
        except DataError:
            return False
        return "Say one." in text and all(reader.placeholder in text for reader in media)

    @functools.cached_property
    def _text_arguments(self) -> bool:
        """Returns whether the template needs arguments as JSON text (DeepSeek), tested on a small call."""
        call = {"name": "weather", "arguments": {"city": "Oslo"}}
        tools = {"tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}]}
        calls = [{"id": "call00001", "type": "function", "function": call}]
        asks = {"role": "user", "content": "weather?"}
        messages = [asks, {"role": "assistant", "content": "", "tool_calls": calls}]
        try:
            if str(call["arguments"]) not in self._rendered(messages, tools, False)[0]:
                return False
        except DataError:
            pass
        try:
            text = self._rendered([*map(_with_text_arguments, messages)], tools, False)[0]
        except DataError:
            return False
        return json.dumps(call["arguments"]) in text

    def _as_read(self, message):
        """The message as the template reads it."""
        message = _with_reasoning(message)
        if self._parts:
            return as_parts(message)
        return {k: v for k, v in message.items() if k != MEDIA} if MEDIA in message else message

    def _rendered(self, messages, given, prompt, marks=False):
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self._tokenizer.special_tokens_map, **self._options, **given}
        try:
            texts, spans = render_jinja_template(
                conversations=[[self._as_read(message) for message in messages]],
                tools=options.pop("tools", None),
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **options,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}."
            ) from None
        except _REFUSALS as error:
            raise DataError(f"the chat template refuses it: {error}", "template") from error
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses it: {error}", "template") from error
        return texts[0], spans[0] if marks else ()


def _with_text_arguments(message):
    calls = message.get("tool_calls")
    if not calls:
        return message
    text = lambda call: json.dumps(call["function"]["arguments"], ensure_ascii=False)
    as_text = lambda call: {**call, "function": {**call["function"], "arguments": text(call)}}
    return {**message, "tool_calls": [as_text(call) for call in calls]}


def _with_reasoning(message):
    """Copies the message's reasoning to the name that gpt-oss's template reads."""
    thought = message.get("reasoning_content")
    return message if thought is None else {**message, "thinking": thought}
