"""Column names: the forms of records, synonyms of our names, and columns that would not be shown.

The tables of names are only for hints and checks: the columns read are those of FORMS or `fields`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.errors import DataError

# The forms of records, in order of precedence.
FORMS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("text",),
    ("tokens",),
)
PAIR = ("chosen", "rejected")

# Synonyms of our columns, the likeliest first.
_QUESTIONS = (
    "question prompt query problem instruction input inputs request human user task article document "
    "dialogue source"
).split()
_ANSWERS = (
    "completion response output solution generated_solution r1_solution_1 answer final_answer outputs "
    "targets target reply assistant answers summary highlights chosen"
).split()
_TEXTS = (
    "content body document passage sentence article code chosen chat conversation transcript transcription "
    "caption normalized_text"
).split()
_TOKENS = ("input_ids", "token_ids")
_ROLES = "role from speaker author sender user".split()
_CONTENTS = "content value text message utterance".split()
_ANSWERING = "assistant gpt chatgpt ai bot model bard bing".split()
_SYSTEM = ("system_prompt", "system_message", "system_instruction")
# Columns that a question depends on: Dolly's, SQuAD's, RACE's, MMLU's, AQuA's, Cohere's.
_GIVEN = "context contexts passage choices options documents document background knowledge".split()
# Columns that are also part of the question if it is in another column.
_ASKED = ("input", "instruction")
_THOUGHTS = (
    "rationale thinking thought thoughts reasoning reasoning_content cot complex_cot chain_of_thought "
    "thinking_trajectories"
).split()
# Columns that look like training text, in lower case.
CONTENT = frozenset(
    {*_QUESTIONS, *_ANSWERS, *_TEXTS, *_GIVEN, *_THOUGHTS, "text", "system", "history"}
    - {"source", "task", "code"}
)
_PREFERENCES = {
    "chosen": ("chosen_response", "preferred_output", "preferred", "accepted", "win"),
    "rejected": ("rejected_response", "non_preferred_output", "dispreferred", "lose"),
    "label": ("kto_tag",),
}


def suggest_fields(row: Mapping[str, Any]) -> dict[str, str]:
    """Suggests `fields` that map this row to a record, from names and types of its values.

    A question and its answer become `question` and `answer`, which go through the chat template; a list of
    messages becomes `messages`. A column that cannot be found is "...".
    """
    for form in FORMS:  # Names with different case or a typing error.
        near = {ours: _near(ours, row) for ours in form}
        if all(near.values()):
            return {ours: theirs for ours, theirs in near.items() if ours != theirs}
    for name, value in row.items():
        if (keys := _message_keys(value)) is not None:
            return {"messages": name} | keys
    if tokens := next((n for n in _TOKENS if isinstance(row.get(n), list)), None):
        return {"tokens": tokens}
    asks = _first(_QUESTIONS, row, (str, list))
    tells = _first([name for name in _ANSWERS if name != asks], row, (str, int, float))
    text = _first(_TEXTS, row, str)
    if text and not (asks and tells):
        return {"text": text}
    if not asks and not tells:
        return {"prompt": "...", "completion": "..."}
    if asks and isinstance(row[asks], list):
        return _renamed(prompt=asks, completion=tells)
    # Null or empty here, they may hold text in another row.
    maybe = lambda name: name in row and (row[name] is None or isinstance(row[name], str))
    extra = next((name for name in _GIVEN if name not in (asks, tells) and maybe(name)), None)
    system = next(({"system": name} for name in _SYSTEM if maybe(name)), {})
    # Alpaca's form has a column for further input, and does not read a column `answer`.
    if extra or asks == "instruction" or ("answer" in row and tells != "answer"):
        given = {} if extra is None else {"input": extra}
        return _renamed(instruction=asks, **given, output=tells) | system
    return _renamed(question=asks, answer=tells) | system


def suggest_pair(row: Mapping[str, Any]) -> str:
    """Suggests what to do with a row without `chosen` or `rejected`, as a clause for an error."""
    for name in row:
        other = _other_side(name)
        if other in row and all(isinstance(row[n], (str, list)) for n in (name, other)):
            return (
                f"{name!r} and {other!r} are two answers, and another column says which is better: write "
                "that as 'chosen', the other as 'rejected', and their question as 'prompt'"
            )
    missing = [name for name in PAIR if name not in row]
    asked = _near("prompt", row) if "prompt" not in row else None
    fields = {"prompt": asked} if asked else {}
    return f"map yours with {flag(fields | {name: _preference(name, row) for name in missing})}"


def absent(name: str, row: Mapping[str, Any]) -> DataError:
    """Returns the error for a preference column that is absent or null in a row."""
    if name in row:
        return DataError(f"{name!r} is null, where a value was expected.", "schema")
    hint = (
        suggest_pair(row)
        if name in PAIR
        else f"map yours with {flag({name: _preference(name, row)})}"
    )
    return DataError(f"no column {name!r} among {sorted(row)}; {hint}.", "schema")


def no_column(name: str, row: Mapping[str, Any]) -> str:
    """Returns the message for a column in `fields` that the row does not have."""
    close = difflib.get_close_matches(name, list(row), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; see --fields, in Python fields=."
    return f"no column {name!r} among {sorted(row)}{hint}"


def flag(fields: Mapping[str, str]) -> str:
    """Formats the fields as typed on the command line and as in Python."""
    return f"{typed(fields)}, in Python fields={dict(fields)}"


def typed(fields: Mapping[str, str]) -> str:
    """Formats the fields as typed on the command line."""
    quoted = lambda name: name if name == "..." else shlex.quote(name)
    return "--fields " + " ".join(f"{a} {quoted(b)}" for a, b in fields.items())


def check_beside(
    row: Mapping[str, Any], form: Sequence[str], shown: str, mapped: Mapping[str, str]
) -> None:
    """Raises DataError if an answer depends on a column whose text the record does not show.

    Args:
        row: the row, with our column names.
        form: the columns that are read: `messages`, or those of question and answer.
        shown: all text of the record.
        mapped: our names -> the file's names.
    """
    for name in _SYSTEM:
        if is_hidden(row.get(name), shown):
            raise DataError(
                f"the column {name!r} would not be shown; take it with {typed({**mapped, 'system': name})}, "
                f"or leave it out with {typed({**mapped, name: ''})}.",
                "schema",
            )
    beside = {"messages": _GIVEN, "conversations": _GIVEN, "text": (), "tokens": ()}
    for name in beside.get(form[0], (*_GIVEN, *_ASKED)):
        alpaca = name == "input" and "instruction" in form
        if not alpaca and not {name} & {*form, *mapped} and is_hidden(row.get(name), shown):
            raise DataError(_beside(name, row, form, mapped), "schema")
    if "text" in form and "parent_id" in row and "role" in row:
        raise DataError(
            "the rows are single messages of a tree of conversations (parent_id, role, text); give whole "
            "conversations as messages, or take each text by itself with --fields parent_id ''.",
            "schema",
        )


def _beside(name, row, form, mapped):
    """Returns the error for a column that the record's form does not show."""
    put, asks, tells = "", form[0], form[-1]
    ours = {"completion": "output", "answer": "output"}.get(tells, tells)
    is_text = isinstance(row[name], str) and isinstance(row.get(asks), str)
    if is_text and name != "instruction" and ours in ("output", "chosen"):
        fields = {"instruction": mapped.get(asks, asks), "input": name}
        fields |= {ours: mapped.get(tells, tells)}
        fields |= {a: b for a, b in mapped.items() if a not in (asks, tells, *fields)}
        fields = {a: b for a, b in fields.items() if a != b}
        put = f"put it after the question with {typed(fields)}, or "
    where = "messages" if len(form) == 1 else "question"
    return (
        f"the column {name!r} would not be shown; {put}write it into the {where}, or leave it out with "
        f"{typed({**mapped, name: ''})}."
    )


def is_hidden(value: Any, shown: str) -> bool:
    """Returns whether a value has text or a number that is not in `shown`, ignoring whitespace."""
    leaves = _leaves(value)
    dense = _dense(shown) if leaves else ""
    return any(_dense(leaf) not in dense for leaf in leaves)


def _near(ours, row):
    if ours in row:
        return ours
    lower = {name.strip().lower(): name for name in row}
    close = difflib.get_close_matches(ours, list(lower), n=1, cutoff=0.85)
    value = row[lower[close[0]]] if close else None
    kinds = list if ours in ("messages", "conversations", "tokens") else (str, int, float)
    kinds = (str, list) if ours in ("prompt", "completion", *PAIR) else kinds
    return lower[close[0]] if value == "" or isinstance(value, kinds) else None


def _message_keys(value):
    """Maps "role" and "content" to a list of messages' own names, where these differ."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, Mapping):
        return None
    role = next((name for name in _ROLES if isinstance(first.get(name), str)), None)
    content = next(
        (name for name in _CONTENTS if name != role and isinstance(first.get(name), str)), None
    )
    if not role or not content or not isinstance(value[-1], Mapping):
        return None
    if str(value[-1].get(role)).lower() not in _ANSWERING:
        return None  # It ends with a question: a prompt.
    usual = (role, content) in (("role", "content"), ("from", "value"))
    return {} if usual else {"role": role, "content": content}


def _first(names, row, kinds):
    lower = {name.strip().lower(): name for name in row}
    fits = lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    return next((lower[name] for name in names if name in lower and fits(row[lower[name]])), None)


def _renamed(**found):
    return {ours: theirs or "..." for ours, theirs in found.items() if ours != theirs}


def _preference(name, row):
    there = next((c for c in _PREFERENCES.get(name, ()) if c in row), None)
    return there or _near(name, row) or "..."


def _other_side(name):
    """Name of the other answer: human_ref_B for human_ref_A, response_1 for response_0; else None."""
    ends = {"A": "B", "a": "b", "0": "1", "1": "2", "j": "k"}
    return name[:-1] + ends[name[-1]] if len(name) > 2 and name[-1] in ends else None


def _leaves(value):
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def _dense(text):
    return "".join(text.split())
