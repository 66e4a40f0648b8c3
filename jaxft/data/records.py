"""Records of supervised fine-tuning in one form, whatever their columns were called."""

from __future__ import annotations

import difflib
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxft.data.errors import DataError

Record = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer")
# What people call our columns; for hints only.
_ALIASES = {
    "messages": ("chat", "dialog", "dialogue", "turns", "conversation"),
    "prompt": ("question", "query", "input", "instruction", "problem"),
    "completion": ("response", "answer", "output", "solution", "target", "reply"),
    "text": ("content", "body", "document", "passage", "sentence"),
}
# The column that has the answer to another's question.
_ANSWERS = {"prompt": "completion", "question": "answer", "instruction": "output"}
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "text",
    "tokens",
    "instruction",
    "input",
    "output",
    "question",
    "answer",
)


def normalise(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """A record with `messages`, `prompt` and `completion`, `text` or `tokens`; the rest is kept.

    Understands those four, sharegpt's `conversations` of from/value, alpaca's instruction/input/
    output and GSM8K's question/answer; roles human, gpt, observation... are renamed.

    Args:
        raw: the row as read.
        fields: our name -> the row's, for columns and for `role` and `content` of messages, as in
            {"messages": "dialog", "role": "speaker", "content": "utterance"}.

    Raises:
        DataError: if a named column is absent, none of the forms fits, or a value is of the wrong kind.
    """
    return check_record(_normalise(raw, fields))


def _normalise(raw, fields):
    fields = dict(fields or {})
    inner = {name: fields.pop(name) for name in ("role", "content") if name in fields}
    row = dict(raw)
    for ours, theirs in fields.items():
        if theirs not in row:
            raise DataError(_no_column(theirs, row))
        row[ours] = row.pop(theirs)
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
        inner = {"role": "from", "content": "value"} | inner
    if "messages" in row:
        return row | {"messages": _messages(row["messages"], inner)}
    if "prompt" in row and "completion" in row:
        return row | prompt_completion(row["prompt"], row["completion"], inner)
    if "instruction" in row and "output" in row:
        extra = row.get("input") or ""
        prompt = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return row | _question(prompt, row["output"])
    if "question" in row and "answer" in row:
        return row | _question(row["question"], str(row["answer"]))
    if "text" in row:
        return row | {"text": _text(row["text"], "text")}
    if "tokens" in row:
        if not len(row["tokens"]):
            raise DataError("'tokens' is empty.")
        return row
    raise DataError(
        f"no usable columns among {sorted(row)}; expected messages, prompt and completion, text or "
        f"tokens. Map yours with fields=, as in fields={suggest_fields(row)}."
    )


def normalise_question(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """A record of `normalise`, or a question alone: `prompt`, `question`, or `instruction` and `input`.

    For what a model is to answer, where a judge scores the answer or a column `answer` tells it. A question
    alone has no `completion`.

    Raises:
        DataError: as `normalise`.
    """
    name = lambda ours: (fields or {}).get(ours, ours)
    if not {name("messages"), name("conversations")} & raw.keys():
        for asks, tells in _ANSWERS.items():
            if name(asks) in raw and name(tells) not in raw:
                record = normalise({**raw, name(tells): "-"}, fields)
                return {k: v for k, v in record.items() if k not in ("completion", tells)}
    return normalise(raw, fields)


def suggest_fields(columns: Iterable[str]) -> dict[str, str]:
    """The `fields` that would probably make records of these columns."""
    columns = list(columns)
    for wanted in (("prompt", "completion"), ("messages",), ("text",)):
        find = lambda ours: next((c for c in columns if c.lower() in (ours, *_ALIASES[ours])), None)
        found = {ours: find(ours) for ours in wanted}
        if all(found.values()):
            return {ours: theirs for ours, theirs in found.items() if ours != theirs}
    return {"prompt": "...", "completion": "..."}


def check_record(record: Record) -> Record:
    """The record, if its weights are weights and its tools are tools."""
    messages = record.get("messages") or []
    _check_weight(record.get("weight"), "weight")
    for i, message in enumerate(messages):
        _check_weight(message.get("weight"), f"weight of message {i}")
        if i and message["role"] == "system":
            raise DataError(f"message {i} has the role system; only the first may.", "role_order")
    if not isinstance(record.get("tools"), str):
        return record
    try:
        return record | {"tools": json.loads(record["tools"])}
    except json.JSONDecodeError as error:
        raise DataError(f"'tools' is not valid JSON ({error.msg}).", "schema") from None


def _check_weight(weight, name):
    fine = isinstance(weight, numbers.Real) and math.isfinite(weight) and weight >= 0
    if weight is not None and not fine:
        raise DataError(f"{name} must be a finite number >= 0, got {weight!r:.40}.", "schema")


def infer_type(columns: Sequence[str]) -> str:
    """The kind of record that has these columns: messages, prompt_completion, text or tokens."""
    names = set(columns)
    forms = {
        "messages": [{"messages"}, {"conversations"}],
        "prompt_completion": [
            {"prompt", "completion"},
            {"instruction", "output"},
            {"question", "answer"},
        ],
        "text": [{"text"}],
        "tokens": [{"tokens"}],
    }
    for kind, choices in forms.items():
        if any(choice <= names for choice in choices):
            return kind
    raise DataError(
        f"no known form has the columns {sorted(names)}; map them with fields={suggest_fields(columns)}."
    )


def as_messages(record: Record) -> list[dict[str, Any]] | None:
    """The conversation of a record, or None if it is plain text."""
    if "messages" in record:
        return record["messages"]
    if isinstance(record.get("prompt"), list):
        return [*record["prompt"], *record.get("completion", [])]
    return None


def _messages(messages: Any, inner: Mapping[str, str]) -> list[dict[str, Any]]:
    role, content = inner.get("role", "role"), inner.get("content", "content")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages must be a list of at least one message, got {messages!r:.80}.")
    return [_message(message, i, role, content) for i, message in enumerate(messages)]


def _message(message, i, role, content):
    if isinstance(message, Mapping):
        # Tables fill absent keys with None.
        message = {k: v for k, v in message.items() if v is not None}
        message = {content: ""} | message if message.get("tool_calls") else message
    if not isinstance(message, Mapping) or role not in message or content not in message:
        raise DataError(
            f"message {i} needs {role!r} and {content!r}, got {message!r:.80}; name them with "
            "fields={'role': ..., 'content': ...}."
        )
    name = ROLES.get(message[role], message[role])
    if name not in KNOWN_ROLES:
        raise DataError(f"message {i} has the role {name!r}; known: {', '.join(KNOWN_ROLES)}.")
    kept = {k: v for k, v in message.items() if k not in (role, content)}
    text = _text(_joined_parts(message[content]), f"content of message {i}")
    if name == "assistant" and not text.strip() and not message.get("tool_calls"):
        raise DataError(f"message {i}, an assistant turn, is empty.", "empty_completion")
    return kept | {"role": name, "content": text}


def _joined_parts(content):
    """The text of [{"type": "text", "text": ...}], the form for several media."""
    parts = content if isinstance(content, (list, tuple)) and content else [None]
    if all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts):
        return "".join(p["text"] for p in parts)
    return content


def prompt_completion(
    prompt: Any, completion: Any, inner: Mapping[str, str], name: str = "completion"
) -> Record:
    """{"prompt", "completion"}, both text, or both messages if either is; `name` is for messages."""
    if isinstance(prompt, list) or isinstance(completion, list):
        whole = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answer = completion
        if not isinstance(completion, list):
            answer = [{"role": "assistant", "content": completion}]
        return {"prompt": _messages(whole, inner), "completion": _messages(answer, inner)}
    if isinstance(completion, str) and not completion.strip():
        raise DataError(f"{name!r} is empty.", "empty_completion")
    return {"prompt": _text(prompt, "prompt"), "completion": _text(completion, name)}


def _question(question, answer):
    return {
        "prompt": [{"role": "user", "content": _text(question, "question")}],
        "completion": [{"role": "assistant", "content": _text(answer, "answer")}],
    }


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {type(value).__name__}: {value!r:.60}.")
    return value


def _no_column(name: str, row: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(row), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"no column {name!r} among {sorted(row)}{hint}"


def answered(record: Mapping[str, Any], text: str) -> Record:
    """The record's question with `text` for its answer: `prompt` and `completion`, as messages or as text."""
    messages = as_messages(record)
    if messages is None:
        return {
            "prompt": record["prompt"] if "prompt" in record else record["text"],
            "completion": text,
        }
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    tools = {"tools": record["tools"]} if "tools" in record else {}
    return {"prompt": messages, "completion": [{"role": "assistant", "content": text}]} | tools
