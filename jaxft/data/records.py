"""Converts records of supervised fine-tuning to one form from various column names."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.columns import FORMS, PAIR, check_beside, flag, no_column, suggest_fields, typed
from jaxft.data.errors import DataError
from jaxft.data.media import MEDIA, place_media
from jaxft.data.messages import (
    UNREAD,
    check_weight,
    parsed_turns,
    read_history,
    read_messages,
    read_tools,
    text_of,
    with_system,
)
from jaxft.data.tokens import TOKEN_COLUMNS, read_tokens
from jaxft.data.values import check_values, from_cell, strict_json

Record = dict[str, Any]

# The column that has the answer to another column's question.
_ANSWERS = {"prompt": "completion", "question": "answer", "instruction": "output"}
_ANSWERED = {*PAIR, "responses", "completions"}  # columns with answers to a `prompt`
# Columns that a record shows, unless it is messages or text.
SHOWN = ("prompt", "completion", "chosen", "rejected", "responses", "completions")
# Columns that a row may lack.
OPTIONAL = ("system", "input", "history", "tools", "id", "weight", "margin")
# Columns that a rendered text depends on in addition to its messages, prompt or answers.
CONTEXT = ("tools", "chat_template_kwargs", MEDIA)
# Columns that the cells of a CSV file hold as text: numbers and JSON lists.
_NUMBERS = ("weight", "margin", "density_ratio")
_CELLS = (*_NUMBERS, "tokens", *TOKEN_COLUMNS, "responses", "scores")
# Variables that a template gets from the record or the tokenizer, not from `chat_template_kwargs`.
_RESERVED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "conversations",
    "chat_template",
)


def normalise(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record with `messages`, `prompt` and `completion`, `text` or `tokens`; keeps the rest.

    Reads these four forms, sharegpt's `conversations` of from/value, alpaca's instruction/input/
    output/system/history and GSM8K's question/answer; renames roles human, gpt, observation... If several
    forms fit, the one with a column in `fields` is used, else the first of FORMS. `tools` become a list,
    `system` and `history` messages; arguments of tool calls become objects.

    Args:
        raw: the row as read.
        fields: our name -> the row's, for columns and for `role` and `content` of messages, as in
            {"messages": "dialog", "role": "speaker", "content": "utterance"}; "" leaves a column out, as
            in {"system": ""}.

    Raises:
        DataError: if a named column is absent, no form fits, or a value has the wrong type.
    """
    return read_row(*renamed(raw, fields))


def read_row(row: dict[str, Any], names: Mapping[str, str], mapped: Mapping[str, str]) -> Record:
    """Returns the record of a row from `renamed`; see `normalise`."""
    form = _form(row, mapped)
    if form in (("messages",), ("conversations",)):
        messages = read_messages(row[form[0]], names, form[0])
        if row.get("history"):
            raise DataError("'history' stands beside messages; put it into them.", "schema")
        made = {"messages": with_system(row.get("system"), messages)}
        row.pop("conversations", None)
    elif form == ("prompt", "completion"):
        made = prompt_completion(row, row["completion"], names)
    elif form in (("instruction", "output"), ("question", "answer")):
        made = _question(row, *form)
    elif form == ("text",):
        made = {"text": text_of(row["text"], "text")}
        if not made["text"].strip():
            raise DataError("'text' is empty.", "empty_completion")
    else:
        made = read_tokens(row)
    check_beside(row, form, shown_text(made), mapped)
    return check_record(own_columns(row, form) | made)


def normalise_question(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record of `normalise`, or only a question: `prompt`, `question`, or `instruction`, `input`.

    For questions to a model whose answer is scored by a judge or compared with a column `answer`. The record
    has no `completion` if the row has no answer or `answer` is a list of acceptable answers.

    Raises:
        DataError: as `normalise`.
    """
    row, names, mapped = renamed(raw, fields)
    given = lambda name: row.get(name) is not None
    if not any(map(given, ("messages", "conversations"))) and not (
        given("prompt") and given("completion")
    ):
        for asks, tells in _ANSWERS.items():
            alone = not given(tells) or (tells == "answer" and not _is_answer(row[tells]))
            if given(asks) and alone:
                record = read_row({**row, tells: "-"}, names, mapped)
                record.pop("completion")
                kept = {tells: row[tells]} if tells in row else {}
                return {k: v for k, v in record.items() if k != tells} | kept
    return read_row(row, names, mapped)


def renamed(
    raw: Mapping[str, Any], fields: Mapping[str, str] | None
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Returns (row with our column names, names of `role` and `content` in messages, other fields)."""
    check_values(raw)
    fields = dict(fields or {})
    names = {name: fields.pop(name) for name in ("role", "content") if name in fields}
    # JSON Lines omit nulls; `load` checks whether any row has such a column.
    fields = {a: b for a, b in fields.items() if not b or b in raw or a not in OPTIONAL}
    for theirs in fields.values():
        if theirs and theirs not in raw:
            raise DataError(no_column(theirs, raw), "schema")
    gone = {*fields.values(), *(ours for ours, theirs in fields.items() if not theirs)}
    row = {name: value for name, value in raw.items() if name not in gone}
    row |= {ours: raw[theirs] for ours, theirs in fields.items() if theirs}
    cells = {name: from_cell(row[name], number=name in _NUMBERS) for name in _CELLS if name in row}
    return row | cells, names, fields


def own_columns(row: Mapping[str, Any], form: tuple[str, ...] = PAIR) -> dict[str, Any]:
    """Removes columns that would be misread, given the form of the row.

    These are our columns that are null, all columns of a form that precedes its own and, in
    conversations, `system` and `history`, which have become messages.
    """
    ours = {name for other in FORMS for name in other} | {"id", "weight", *CONTEXT}
    gone = {name for name in ours if name in row and row[name] is None}
    before = FORMS[: FORMS.index(form)] if form in FORMS else FORMS[:1]
    gone |= {name for other in before if all(n in row for n in other) for name in other}
    gone |= set() if form in (("text",), ("tokens",)) else {"system", "history"}
    return {name: value for name, value in row.items() if name not in gone}


def _form(row, mapped):
    given = lambda name: row.get(name) is not None
    present = [form for form in FORMS if all(map(given, form))]
    if present:
        form = max(present, key=lambda form: len(mapped.keys() & set(form)))
        both = [name for name in ("prompt", "completion") if given(name)]
        if form in (("instruction", "output"), ("question", "answer")) and both:
            raise DataError(
                f"the columns {sorted({*form, *both})} give the question or answer twice; leave one out, "
                f"as in {typed({**mapped, both[0]: ''})}.",
                "schema",
            )
        return form
    null = [form for form in FORMS if all(name in row for name in form)]
    if null:
        names = [repr(name) for name in null[0] if not given(name)]
        raise DataError(f"{' and '.join(names)}: null, where text was expected.", "schema")
    raise DataError(
        f"no usable columns among {sorted(row)}; expected messages, question and answer, prompt and "
        f"completion (plain text), text or tokens. Map yours with {flag(suggest_fields(row))}.",
        "schema",
    )


def check_record(record: Record) -> Record:
    """Reads the record's tools, images and clips; raises DataError for invalid weights or media."""
    check_weight(record.get("weight"), "weight")
    for name in UNREAD:
        value = record.get(name)
        if value is not None and not (isinstance(value, (str, Sequence)) and not len(value)):
            raise DataError(
                f"the column {name!r} holds data that no model here can be shown; leave it out with "
                f"--fields {name} '', in Python fields={{{name!r}: ''}}.",
                "schema",
            )
    record = place_media(record)
    tools = record.get("tools")
    if tools is None and "messages" in record and record.get("functions"):
        tools = record["functions"]  # OpenAI's, before there were tools
    made = {k: v for k, v in record.items() if k != "tools"}
    tools = read_tools(tools)
    return made | _template_options(record) | ({"tools": tools} if tools else {})


def context(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a chat template's arguments from a record besides messages: `tools` and own variables."""
    tools = record.get("tools")
    return {**(record.get("chat_template_kwargs") or {}), **({"tools": tools} if tools else {})}


def whole_prompt(record: Mapping[str, Any]) -> str:
    """Returns a text that is equal only for equal prompts, with system message, history and tools.

    A record without a prompt, or with an empty one, is known by its text, tokens or answer.
    """
    messages = as_messages(record)
    if messages is None:
        names = ("prompt", "text", "tokens", "completion")
        text = str(next((record[name] for name in names if record.get(name)), ""))
        return text + "".join(f" {one.identity}" for one in record.get(MEDIA) or ())
    whole = messages
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    messages = messages or whole
    told = lambda value: getattr(value, "identity", None) or str(value)
    return json.dumps([messages, context(record)], sort_keys=True, default=told)


def shown_text(record: Mapping[str, Any]) -> str:
    """Returns all text that a record shows: contents of its messages, or prompt, answers and text."""
    names = ("text",) if "text" in record and "prompt" not in record else SHOWN
    parts = ("messages",) if record.get("messages") is not None else names
    return "\n".join(text for name in parts for text in _contents(record.get(name)))


def _contents(value):
    if isinstance(value, Mapping):
        return [value["content"]] if isinstance(value.get("content"), str) else []
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _contents(item)]
    return [value] if isinstance(value, str) else []


def infer_type(columns: Sequence[str]) -> str:
    """Returns the kind of record with these columns: messages, prompt_completion, text or tokens."""
    form = _form(dict.fromkeys(columns, ""), {})
    kinds = {
        "messages": "messages",
        "conversations": "messages",
        "text": "text",
        "tokens": "tokens",
    }
    return kinds.get(form[0], "prompt_completion")


def as_messages(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the conversation of a record, or None if it is plain text."""
    if record.get("messages") is not None:
        return record["messages"]
    prompt = record.get("prompt")
    if not isinstance(prompt, list):
        return None
    if "completion" in record:
        return [*prompt, *record["completion"]]
    # A list in a record with text or tokens is a user's column, not a prompt.
    other = not record.keys().isdisjoint(("text", "tokens"))
    return prompt if record.keys() & _ANSWERED or not other else None


def prompt_completion(
    row: Mapping[str, Any], completion: Any, names: Mapping[str, str], name: str = "completion"
) -> Record:
    """Returns {"prompt", "completion"}, both text, or both messages if either is; `name` is for errors.

    Both are also messages if the row has a `system` or `history` column, which precede the prompt.
    """
    prompt, completion = conversation_texts(row["prompt"], completion)
    history = read_history(row.get("history"))
    answer = [completion] if isinstance(completion, Mapping) else completion
    chat = isinstance(prompt, list) or isinstance(answer, list) or history or row.get("system")
    if not chat:
        prompt, completion = text_of(prompt, "prompt"), text_of(completion, name)
        if not completion.strip():
            raise DataError(f"{name!r} is empty.", "empty_completion")
        _check_repeated(prompt, completion, name)
        return {"prompt": prompt, "completion": completion}
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    asked = read_messages(asked, names, "prompt")
    first = asked[:1] if history and asked[0]["role"] in ("system", "developer") else []
    asked = with_system(row.get("system"), [*first, *history, *asked[len(first) :]])
    answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    said = read_messages(answer, names, name)
    if said[: len(asked)] == asked:  # The completion is the whole conversation.
        said = said[len(asked) :]
    if not any(message["role"] == "assistant" for message in said):
        raise DataError(f"{name!r} has no assistant message.", "role_order")
    return {"prompt": asked, "completion": said}


def conversation_texts(prompt: Any, *answers: Any) -> list[Any]:
    """Parses a prompt (or None) and its answers if they are JSON text of messages, as in a table's cells.

    Answers to a prompt of plain text are parsed only if they begin with it: such an answer may be JSON.
    """
    asked, said = parsed_turns(prompt), [parsed_turns(answer) for answer in answers]
    if isinstance(asked, str) and asked:
        begins = lambda turns: isinstance(turns, list) and asked in map(_said, turns)
        said = [b if begins(b) else a for a, b in zip(answers, said, strict=True)]
    return [asked, *said]


def _said(turn):
    return turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None


def _check_repeated(prompt, completion, name):
    """Raises DataError if the completion repeats the prompt; short prompts may repeat by chance."""
    if len(prompt.strip()) >= 20 and completion.lstrip().startswith(prompt.strip()):
        raise DataError(
            f"{name!r} begins with the whole prompt, which would train twice; remove it from one of them.",
            "schema",
        )


def _question(row, asks, tells):
    """Converts a question and its answer to messages, with alpaca's `input`, `history` and `system`."""
    question, answer = text_of(row[asks], asks), row[tells]
    extra = row.get("input") if asks == "instruction" else None
    parts = [question, text_of(extra, "input")] if extra is not None else [question]
    if not _is_answer(answer):
        text_of(answer, tells)
    prompt = {**row, "prompt": "\n\n".join(part for part in parts if part)}
    prompt["prompt"] = [{"role": "user", "content": prompt["prompt"]}]
    made = prompt_completion(prompt, [{"role": "assistant", "content": str(answer)}], {})
    if not read_history(row.get("history")):
        return made
    # The answers of a history train too, as in LLaMA-Factory.
    return {"messages": [*made["prompt"], *made["completion"]]}


def _is_answer(value):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, str) or (number and abs(value) < 1e300)  # False for NaN


def _template_options(record):
    given = record.get("chat_template_kwargs")
    given = (
        strict_json(given, "chat_template_kwargs") if isinstance(given, str) and given else given
    )
    if not given:
        return {}
    if not isinstance(given, Mapping) or set(given) & set(_RESERVED):
        raise DataError(
            f"chat_template_kwargs must be an object of a template's own variables, got {given!r:.60}.",
            "schema",
        )
    return {"chat_template_kwargs": dict(given)}


def answered(record: Mapping[str, Any], text: str) -> Record:
    """Answers the record's question with `text`: `prompt` and `completion`, as messages or text."""
    messages = as_messages(record)
    kept = {name: record[name] for name in CONTEXT if name in record}
    if messages is None:
        asked = record["prompt"] if "prompt" in record else record["text"]
        return {"prompt": asked, "completion": text} | kept
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return {"prompt": messages, "completion": [{"role": "assistant", "content": text}]} | kept
