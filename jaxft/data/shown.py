"""Finds the parts of a conversation that a chat template omits from its text.

Templates read only the fields that they know: a system message, tools or reasoning that a template does not
know is omitted without an error. This module searches the rendered text for every text of a conversation. It
allows what templates do on purpose: stripped or added whitespace and JSON's escapes. It requires reasoning
only in turns that train, since templates drop that of earlier turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.data.errors import DataError
from jaxft.data.media import kinds_of, without_markers

_THINK = re.compile(r"</?(?:think|thinking)>")
# Keys of a message with text that some templates show (Cohere's tool_plan) and most ignore.
_THOUGHTS = (
    "thought thoughts think analysis rationale cot chain_of_thought reasoning_text reasoning_details "
    "tool_plan"
).split()
_SHORT = 24  # characters; shorter texts may occur by chance

_REMEDY = "remove it from the data, or pass a template that shows it (--template)."
_REMEDIES = {
    "tools": "describe the tools in the system message, or pass a template that shows them "
    "(--template, such as the tokenizer's tool_use).",
    "tool_calls": "write the calls into the content as the model should write them, or pass a template "
    "that shows them (--template).",
    "reasoning_content": "write it into the content, between <think> and </think>, or pass a template "
    "that shows it (--template).",
    "content": "remove it from the data (a system message may go into the first user message), or pass "
    "a template that shows it (--template).",
}


class Piece(NamedTuple):
    """A text that must be found."""

    path: tuple[str | int, ...]  # into {"messages": ..., "tools": ...}
    value: Any  # text or number
    whole: bool  # whether it is the whole value at `path`, which can then be replaced

    def __str__(self) -> str:
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path)
        return f"{place.lstrip('.')} ({self.value!r:.40})"


def left_out(
    render: Callable[[list, Mapping], str],
    messages: Sequence[Mapping],
    context: Mapping[str, Any],
    text: str,
    trained: Collection[int],
) -> list[Piece]:
    """Returns the pieces of the messages and of the tools in `context` that are not in `text`.

    Long pieces are searched for. Short pieces may occur by chance, so they are also replaced by a mark: they
    count as shown only if the text changes.

    Args:
        render: (messages, context) -> text.
        text: the result of `render` for them.
        trained: the messages whose reasoning must be shown.
    """
    pieces = [*_of_messages(messages, trained), *_of_tools(context.get("tools") or ())]
    dense = _dense(text)
    gone = [piece for piece in pieces if not _found(piece.value, text, dense)]
    short = [piece for piece in pieces if piece.whole and len(piece.value) < _SHORT]
    return _without_effect(render, messages, context, text, short) + [
        piece for piece in gone if piece not in short
    ]


def refuse(lost: Sequence[Piece]) -> None:
    """Raises DataError if a template omits any pieces."""
    if lost:
        path = lost[0].path
        field = path[0] if path[0] == "tools" else path[2]
        field = "reasoning_content" if field in _THOUGHTS else field
        raise DataError(
            f"the chat template does not show {', '.join(map(str, lost[:3]))}; "
            f"{_REMEDIES.get(field, _REMEDY)}",
            "template",
        )


def _without_effect(render, messages, context, text, pieces):
    """Returns the pieces that can be replaced without changing the text."""
    given = {"messages": list(messages), **context}

    def rendered(replaced):
        data = given
        for piece, mark in replaced:
            data = _replaced(data, piece.path, mark)
        try:
            return render(data["messages"], {k: v for k, v in data.items() if k != "messages"})
        except DataError:
            return None  # Some templates parse the values that they show.

    marks = [(piece, f"jaxft{i:04d}jaxft") for i, piece in enumerate(pieces)]
    together = rendered(marks) if marks else None
    alone = lambda piece, mark: rendered([(piece, mark)])
    return [
        piece
        for piece, mark in marks
        if (together is None or mark not in together) and alone(piece, mark) == text
    ]


def _of_messages(messages, trained) -> Iterator[Piece]:
    asked: list[str | None] = []  # ids of calls without a result so far
    for i, message in enumerate(messages):
        place, content, full = ("messages", i), message["content"], i in trained
        parts = [part for part in _THINK.split(content) if part.strip()]
        if message["role"] == "assistant" and not full:
            parts = parts[-1:]
        if kinds := kinds_of(message):
            parts = [text for part in parts for text in without_markers(part, kinds)]
        whole = parts == [content]
        yield from (Piece((*place, "content"), part, whole) for part in parts)
        if full and message.get("reasoning_content"):
            yield Piece((*place, "reasoning_content"), message["reasoning_content"], True)
        for key in _THOUGHTS if full else ():
            yield from _thoughts((*place, key), message.get(key))
        if message.get("name"):
            # Templates that do not show the tool's name with its result show it in the call.
            yield Piece((*place, "name"), message["name"], message["role"] != "tool")
        for j, call in enumerate(message.get("tool_calls") or ()):
            function = (*place, "tool_calls", j, "function")
            yield Piece((*function, "name"), call["function"]["name"], True)
            yield from _leaves((*function, "arguments"), call["function"]["arguments"])
            asked.append(call.get("id"))
        if message.get("tool_call_id"):
            # If the text has no ids, results belong to calls by their order.
            if asked and message["tool_call_id"] != asked[0]:
                yield Piece((*place, "tool_call_id"), message["tool_call_id"], False)
            asked = [name for name in asked if name != message["tool_call_id"]]


def _thoughts(path, value) -> Iterator[Piece]:
    """Yields the text of a thought: text, or OpenRouter's list of objects with `text` or `summary`."""
    if isinstance(value, str) and value.strip():
        yield Piece(path, value, True)
    for i, part in enumerate(value if isinstance(value, (list, tuple)) else ()):
        for key in ("text", "summary"):
            said = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(said, str) and said.strip():
                yield Piece((*path, i, key), said, True)


def _of_tools(tools) -> Iterator[Piece]:
    for i, tool in enumerate(tools):
        function, place = tool.get("function", tool), ("tools", i, "function")
        if not isinstance(function, Mapping):
            continue
        for key in ("name", "description"):
            if isinstance(function.get(key), str) and function[key].strip():
                yield Piece((*place, key), function[key], "function" in tool)
        properties = (function.get("parameters") or {}).get("properties")
        for name, schema in (properties if isinstance(properties, Mapping) else {}).items():
            inner = (*place, "parameters", "properties", name)
            yield Piece(inner, name, False)
            about = schema.get("description") if isinstance(schema, Mapping) else None
            if isinstance(about, str) and about.strip():
                yield Piece((*inner, "description"), about, True)


def _leaves(path, value) -> Iterator[Piece]:
    """Yields keys and values of a call's arguments."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key.strip():
                yield Piece((*path, key), key, False)
            yield from _leaves((*path, key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves((*path, i), item)
    elif not isinstance(value, str) or value.strip():
        yield Piece(path, value, isinstance(value, str))


def _found(value, text, dense):
    if isinstance(value, str) and value.strip() in text:
        return True
    forms = [json.dumps(value), str(value)]
    if isinstance(value, str):
        escaped = [json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]]
        forms = [value, *escaped, *(json.dumps(form)[1:-1] for form in escaped)]
    return any(form in text for form in forms) or any(_dense(form) in dense for form in forms)


def _dense(text):
    return "".join(text.split())


def _replaced(data, path, value):
    """Returns a copy with another value at the path; only containers on the path are copied."""
    key, *rest = path
    inner = _replaced(data[key], rest, value) if rest else value
    if isinstance(data, Mapping):
        return {**data, key: inner}
    return [*data[:key], inner, *data[key + 1 :]]
