"""Converts messages and tools of all dialects to one form, that of chat templates and OpenAI's API.

A message is {"role", "content"} and, if given, `tool_calls`, `tool_call_id`, `name`,
`reasoning_content`, `train`, `weight` and `_media`, the images and clips whose markers stand in the content.
Anything else is refused, never dropped.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.errors import DataError
from jaxft.data.media import MARKERS, MEDIA, MEDIA_COLUMNS, Media, place_media, read_part
from jaxft.data.values import check_values, strict_json

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer")
# Roles whose content is a tool call as JSON text: LLaMA-Factory's and ms-swift's.
_CALL_ROLES = ("function_call", "tool_call")
# Names of the reasoning; the first is that of chat templates.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Other trainers' names for `train`: axolotl's and ms-swift's.
_TRAIN = ("train", "training", "loss")
# Keys that choose trained tokens inside a turn, or packed turns, and have no counterpart here.
_TRAIN_PARTS = ("train_detail", "loss_scale", "loss_mask")
UNREAD = ("video", "videos")  # media that no model here reads
_UNREAD_PARTS = (*UNREAD, "video_url", "file")


def read_messages(
    messages: Any, names: Mapping[str, str], column: str = "messages"
) -> list[Message]:
    """Reads the messages of a column: a list of dicts, or that list as JSON text.

    Args:
        names: the names of `role` and `content`; default: these, or `from` and `value`.
        column: the column's name, for error messages.

    Raises:
        DataError: if a message cannot be rendered unchanged.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = strict_json(messages, column)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{column} must be a list of at least one message, got {messages!r:.80}.")
    sharegpt = (
        isinstance(messages[0], Mapping) and "role" not in messages[0] and "from" in messages[0]
    )
    role, content = ("from", "value") if sharegpt else ("role", "content")
    role, content = names.get("role", role), names.get("content", content)
    if all(isinstance(message, str) for message in messages):
        raise DataError(
            f"{column} is a list of texts that do not say who speaks; write each as {{'role': 'user', "
            "'content': ...}, with user and assistant alternating.",
            "schema",
        )
    return [_message(message, i, role, content) for i, message in enumerate(messages)]


def parsed_turns(value: Any) -> Any:
    """Parses text that is a JSON list of messages, as in a table's cells; other values do not change."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        turns = strict_json(value, "messages")
    except DataError:
        return value
    speaks = lambda turn: (
        isinstance(turn, Mapping)
        and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
    )
    return turns if isinstance(turns, list) and all(map(speaks, turns)) else value


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """Reads tools as a list of {"type": "function", "function": {"name", "description", "parameters"}}.

    Accepts such a list, only the inner dicts, a single one, or JSON text of any of these; None, "",
    [] and {} mean no tools.

    Raises:
        DataError: if an entry is not a tool.
    """
    if isinstance(tools, str):
        tools = strict_json(tools, "tools") if tools.strip() else None
    tools = [tools] if isinstance(tools, Mapping) and tools else tools
    if tools is None or (isinstance(tools, (Mapping, Sequence)) and not len(tools)):
        return []
    if not isinstance(tools, (list, tuple)):
        raise DataError(f"tools must be a list of function schemas, got {tools!r:.60}.", "schema")
    check_values(tools, finite=True)
    return [_tool(tool, i) for i, tool in enumerate(tools)]


def read_history(history: Any) -> list[Message]:
    """Converts LLaMA-Factory's `history`, [question, answer] pairs, to messages; None, "", []: none."""
    if isinstance(history, str):
        history = strict_json(history, "history") if history.strip() else None
    if history is None or history == []:
        return []
    if isinstance(history, list) and all(isinstance(turn, Mapping) for turn in history):
        return read_messages(history, {}, "history")
    is_pair = lambda turn: isinstance(turn, (list, tuple)) and len(turn) == 2
    if not isinstance(history, list) or not all(map(is_pair, history)):
        raise DataError(
            f"history must be a list of [question, answer], got {history!r:.60}.", "schema"
        )
    turns = [
        (role, text)
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return read_messages([{"role": r, "content": text} for r, text in turns], {}, "history")


def with_system(system: Any, messages: list[Message]) -> list[Message]:
    """Prepends a system message from the column `system`; None and "" mean none.

    Raises:
        DataError: if the messages begin with a different one, or the column is not text.
    """
    if system is None or system == "":
        return messages
    system = text_of(system, "the column 'system'")
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"].strip() != system.strip():
            raise DataError(
                "the column 'system' and the first message differ; leave one out "
                "(--fields system '').",
                "schema",
            )
        return messages
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def text_of(value: Any, name: str) -> str:
    """Returns the value if it is text; raises DataError otherwise."""
    if (
        isinstance(value, (list, tuple))
        and len(value) > 1
        and all(isinstance(v, str) for v in value)
    ):
        raise DataError(
            f"{name} must be text, got a list of {len(value)} texts; which of them is meant? Give one.",
            "schema",
        )
    if not isinstance(value, str):
        raise DataError(
            f"{name} must be text, got {type(value).__name__}: {value!r:.60}.", "schema"
        )
    return value


def check_weight(weight: Any, name: str) -> None:
    """Raises DataError unless the weight is None or a finite number >= 0."""
    fine = isinstance(weight, numbers.Real) and 0 <= weight < 1e30 and math.isfinite(weight)
    if weight is not None and not fine:
        raise DataError(f"{name} must be a finite number >= 0, got {weight!r:.40}.", "schema")


def _message(message, i, role, content):
    null = isinstance(message, Mapping) and content in message and message[content] is None
    if isinstance(message, Mapping):
        # OpenAI's SDK and tables write absent keys as null.
        message = {k: v for k, v in message.items() if v is not None}
        calls = message.get("tool_calls") or message.get("function_call")
        message = {content: ""} | message if calls else message
    if null and not isinstance(message.get(content), str):
        raise DataError(f"the content of message {i} is null.", "schema")
    if not isinstance(message, Mapping) or role not in message or content not in message:
        raise DataError(
            f"message {i} needs {role!r} and {content!r}, got {message!r:.80}; name them with "
            "fields={'role': ..., 'content': ...}.",
            "schema",
        )
    said = message[role]
    said = said.lower() if isinstance(said, str) else said
    name = ROLES.get(said, said) if isinstance(said, str) else said
    if name not in KNOWN_ROLES:
        raise DataError(
            f"message {i} has the role {name!r:.40}; known: {', '.join(KNOWN_ROLES)}.", "schema"
        )
    kept = _details({k: v for k, v in message.items() if k not in (role, content)}, i)
    joined, media = _joined_parts(message[content], i)
    text = text_of(joined, f"content of message {i}")
    made = _with_calls(kept, name, text, said in _CALL_ROLES, i)
    made = _with_media(made, media, i)
    if not made["content"].strip() and not made.get("tool_calls"):
        if name == "assistant":
            raise DataError(f"message {i}, an assistant turn, is empty.", "empty_completion")
        if name == "user":
            raise DataError(f"message {i}, a user turn, is empty.", "empty_prompt")
    return made


def _with_calls(kept, role, text, is_call, i):
    """Returns {"role", "content"} with `tool_calls`, from any of their forms, and the other keys."""
    given = [
        kept.get("tool_calls"),
        kept.get("function_call"),
    ]  # function_call: OpenAI's older form
    if is_call:
        thought, end, call = text.rpartition("</think>")
        given.append(strict_json(call, f"message {i}, a function call"))
        text = thought + end
    found = [
        calls for calls in (_calls(calls, f"message {i}") for calls in given if calls) if calls
    ]
    if len(found) > 1:
        raise DataError(f"message {i} has its tool calls twice; leave one out.", "schema")
    rest = {k: v for k, v in kept.items() if k not in ("tool_calls", "function_call")}
    made = rest | {"role": role, "content": text}
    return made | {"tool_calls": found[0]} if found else made


def _calls(calls, name):
    calls = strict_json(calls, f"tool_calls of {name}") if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) and calls else calls
    if not calls and calls in (None, [], {}):
        return []
    if not isinstance(calls, (list, tuple)):
        raise DataError(f"tool_calls of {name} must be a list, got {calls!r:.60}.", "schema")
    return [_call(call, f"tool call {j} of {name}") for j, call in enumerate(calls)]


def _call(call, name):
    function = call.get("function", call) if isinstance(call, Mapping) else None
    called = function.get("name") if isinstance(function, Mapping) else None
    if (
        not isinstance(called, str)
        or not called.strip()
        or call.get("type") not in (None, "function")
    ):
        raise DataError(
            f"{name} must be a function with 'name' and 'arguments', got {call!r:.60}.", "schema"
        )
    outer = ("id", "type", "index", "function")
    others = {k for k, v in function.items() if v is not None} - {"name", "arguments", *outer}
    others |= set(call) - {*outer, "name", "arguments"}
    if others:
        raise DataError(f"{name} has {sorted(others)} beside 'name' and 'arguments'.", "schema")
    rest = {k: call[k] for k in ("id", "index") if call.get(k) is not None}
    function = {"name": called, "arguments": _arguments(function.get("arguments"), name)}
    return rest | {"type": "function", "function": function}


def _arguments(arguments, name):
    """Converts arguments to an object, which templates write as JSON; OpenAI's API has text."""
    if isinstance(arguments, str):
        arguments = strict_json(arguments, f"arguments of {name}") if arguments.strip() else None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise DataError(f"arguments of {name} must be an object, got {arguments!r:.60}.", "schema")
    check_values(arguments, finite=True)
    return dict(arguments)


def _tool(tool, i):
    tool = strict_json(tool, f"tool {i}") if isinstance(tool, str) else tool
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"tool {i} must be a function with a 'name', got {tool!r:.60}.", "schema")
    parameters = function.get("parameters")
    if isinstance(parameters, str):  # Tables can hold differing schemas only as text.
        parameters = (
            strict_json(parameters, f"parameters of tool {i}") if parameters.strip() else {}
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise DataError(
            f"parameters of tool {i} must be an object, got {parameters!r:.60}.", "schema"
        )
    own = {} if parameters is None else {"parameters": parameters}
    rest = {key: value for key, value in function.items() if key != "parameters"}
    return {**tool, "type": "function", "function": rest | own}


def _details(kept, i):
    """Returns the other keys of a message; checks those that are part of the conversation."""
    thoughts = {name: kept[name] for name in REASONING if name in kept}
    given = {text_of(value, f"{key} of message {i}") for key, value in thoughts.items()} - {""}
    if len(given) > 1:
        raise DataError(f"message {i} has {' and '.join(thoughts)}, which differ.", "schema")
    found = {"reasoning_content": given.pop()} if given else {}
    for key in ("name", "tool_call_id"):
        if key in kept:
            text_of(kept[key], f"{key} of message {i}")
    for key in ("refusal", *UNREAD):
        if kept.get(key) not in (None, "", [], {}):
            raise DataError(
                f"message {i} has {key!r}, which no model here can be shown; write it into the "
                "content, or remove it.",
                "schema",
            )
    check_weight(kept.get("weight"), f"weight of message {i}")
    rest = {key: value for key, value in kept.items() if key not in (*REASONING, *_TRAIN)}
    return rest | found | _trains(kept, i)


def _trains(kept, i):
    """Returns {"train": ...} if the message says whether it trains, by any of the names in _TRAIN."""
    given = {name: kept[name] for name in _TRAIN if name in kept}
    for name, value in given.items():
        if value not in (True, False):  # 1.0 is True: tables have one type for a column.
            raise DataError(
                f"{name} of message {i} must be true or false, got {value!r:.40}.", "schema"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise DataError(f"message {i} has {' and '.join(given)}, which differ.", "schema")
    for name in _TRAIN_PARTS:
        if kept.get(name) not in (None, [], {}, 1):
            raise DataError(
                f"message {i} has {name!r}, which chooses tokens inside a turn and is not read; use "
                "--train-on, a message's 'train', or remove it.",
                "schema",
            )
    return {"train": any(map(bool, given.values()))} if given else {}


def _joined_parts(content, i):
    """(text, images and clips) of [{"type": "text", "text": ...}, {"type": "image", "image": ...}].

    Parts are joined without a blank, as in the templates that read them (Llama 3.2, Qwen 2.5 VL), with a
    marker for each image or clip.
    """
    if not isinstance(content, (list, tuple)) or not content:
        return content, ()
    if not all(isinstance(part, Mapping) for part in content):
        return content, ()
    texts, media = [], []
    for part in content:
        kind = part.get("type")
        if kind in _UNREAD_PARTS:
            raise DataError(
                f"message {i} has a part of the type {kind!r}, which no model here can be shown; "
                "remove such parts.",
                "schema",
            )
        if (found := read_part(part)) is not None:
            texts.append(MARKERS[found[0]])
            media += [] if found[1] is None else [found[1]]
            continue
        if kind not in ("text", "input_text", "output_text") or not isinstance(
            part.get("text"), str
        ):
            raise DataError(
                f"message {i} has the part {part!r:.60}; known are text, image and audio parts.",
                "schema",
            )
        if held := [key for key in MEDIA_COLUMNS if part.get(key) is not None]:
            raise DataError(
                f"message {i} has a text part with {held[0]!r}, which would not be shown; write two "
                "parts.",
                "schema",
            )
        texts.append(part["text"])
    return "".join(texts), tuple(media)


def _with_media(made: Message, media: tuple[Media, ...], i: int) -> Message:
    """The message with those of its parts or of its keys `images` and `audios`."""
    if not media and not MEDIA_COLUMNS.keys() & made.keys():
        return made
    columns = {key: made[key] for key in MEDIA_COLUMNS if key in made}
    rest = {key: value for key, value in made.items() if key not in MEDIA_COLUMNS}
    rest |= {MEDIA: media} if media else {}
    try:
        return place_media({"messages": [rest]} | columns)["messages"][0]
    except DataError as error:
        raise DataError(f"message {i}: {error}", "schema") from None
