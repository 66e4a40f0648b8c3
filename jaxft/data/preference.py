"""Records of preferences: pairs, single completions with a label, ranked completions."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.columns import PAIR, absent, check_beside, flag
from jaxft.data.errors import DataError
from jaxft.data.messages import ROLES, text_of
from jaxft.data.records import (
    Record,
    check_record,
    conversation_texts,
    own_columns,
    prompt_completion,
    read_row,
    renamed,
    shown_text,
)


def normalise_pair(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record with `prompt`, `chosen`, `rejected`, all text or all messages; keeps the rest.

    Reads TRL's columns. Without a `prompt`, or if the `prompt` repeats as text the beginning of both
    conversations, the prompt is their longest common prefix of messages, or of characters up to a blank. Also
    reads LLaMA-Factory's columns: the prompt in `conversations` or `instruction` and `input`, with `system`
    and `history`. `margin`, if present, must be a number.

    Args:
        raw: the row as read.
        fields: our name -> the row's; see `normalise`.

    Raises:
        DataError: if a column is absent, empty or of the wrong kind, or both completions are the same.
    """
    row, names, mapped = renamed(raw, fields)
    for name in PAIR:
        if row.get(name) is None:
            raise absent(name, row)
    form, prompt = _asked(row)
    prompt, *answers = conversation_texts(prompt, row["chosen"], row["rejected"])
    chosen, rejected = map(_turns, answers)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not _is_chat(value) and not text_of(value, name).strip():
            raise DataError(f"{name!r} is empty.", "empty_completion")
    if _is_chat(chosen) != _is_chat(rejected):
        raise DataError("'chosen' and 'rejected' must both be text or both be messages.", "schema")
    if prompt is None and not (_is_chat(chosen) and _opens(chosen)):
        _check_question(row, chosen)
    if prompt is None or (_is_chat(chosen) and isinstance(prompt, str) and _opens(chosen)):
        given = prompt
        prompt, chosen, rejected = common_prompt(chosen, rejected)
        _check_asked(given, prompt)
    row["prompt"] = prompt
    first = prompt_completion(row, chosen, names, "chosen")
    second = prompt_completion(row, rejected, names, "rejected")
    if first["completion"] == second["completion"]:
        raise DataError("'chosen' and 'rejected' are the same.", "identical_pair")
    if first["prompt"] != second["prompt"]:
        raise DataError("'chosen' and 'rejected' begin with different prompts.", "schema")
    _check_number(row.get("margin"), "margin")
    made = {"chosen": first["completion"], "rejected": second["completion"]}
    made |= {"prompt": first["prompt"]}
    check_beside(row, (form, "chosen"), shown_text(made), mapped)
    return check_record(own_columns(row) | made)


def normalise_unpaired(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record with `prompt`, `completion` and `label`: True if the completion is desirable.

    Raises:
        DataError: see `normalise`; also if the label is not a truth value.
    """
    row, names, mapped = renamed(raw, fields)
    if row.get("label") is None:
        raise absent("label", row)
    label = row["label"]
    if isinstance(label, str):  # The cells of CSV are text.
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    if label is None or label not in (True, False):
        raise DataError(f"'label' must be true or false, got {row['label']!r:.40}.", "schema")
    _check_number(row.get("density_ratio"), "density_ratio")
    record = read_row(row, names, mapped) | {"label": bool(label)}
    messages = record.pop("messages", None)
    if messages is not None:  # The label belongs to the last answer.
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(
                "a labelled conversation must end with an assistant turn.", "role_order"
            )
        record |= {"prompt": messages[:-1], "completion": messages[-1:]}
    if "completion" not in record:
        raise DataError("a label needs a prompt and a completion, got a text.", "schema")
    return record


def normalise_ranked(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record with `prompt`, `responses` and `scores`, for `best_worst` and `all_pairs`.

    Raises:
        DataError: if a column is absent, or there is not one finite score for each response.
    """
    row, names, mapped = renamed(raw, fields)
    for name in ("prompt", "responses", "scores"):
        if row.get(name) is None:
            raise absent(name, row)
    for name in ("responses", "scores"):
        if not isinstance(row[name], (list, tuple)):
            raise DataError(f"{name!r} must be a list, got {row[name]!r:.40}.", "schema")
    responses, scores = list(row["responses"]), list(row["scores"])
    if len(responses) != len(scores) or len(scores) < 2:
        raise DataError(
            f"{len(responses)} responses and {len(scores)} scores; expected at least two of both.",
            "schema",
        )
    for i, score in enumerate(scores):
        _check_number(score, f"scores[{i}]", "nan_score")
    made = [prompt_completion(row, response, names, "responses") for response in responses]
    texts = [m["completion"] for m in made]
    own = {"prompt": made[0]["prompt"], "responses": texts, "scores": scores}
    check_beside(row, ("prompt", "responses"), shown_text(own), mapped)
    return check_record(own_columns(row) | own)


def common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Returns (prompt, rest of chosen, rest of rejected): the common prefix, messages or text.

    A blank before the completions belongs to them, as in TRL.

    Raises:
        DataError: if there is no common prefix, or one completion would be empty.
    """
    if _is_chat(chosen) != _is_chat(rejected):
        raise DataError("'chosen' and 'rejected' must both be text or both be messages.", "schema")
    pairs = zip(chosen, rejected, strict=False)
    count = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
    if len(chosen) == len(rejected) == count:
        raise DataError("'chosen' and 'rejected' are the same.", "identical_pair")
    if not _is_chat(chosen) and count and chosen[count - 1] == " ":
        count -= 1
    if count == 0:
        raise DataError(
            "there is no 'prompt', and 'chosen' and 'rejected' have no beginning in common; name the "
            "question's column NAME with --fields question NAME.",
            "schema",
        )
    if count in (len(chosen), len(rejected)):
        shorter = "chosen" if count == len(chosen) else "rejected"
        raise DataError(
            f"{shorter!r} is only the beginning of the other, so its completion is empty.",
            "empty_completion",
        )
    return chosen[:count], chosen[count:], rejected[count:]


def unpair(pairs: Sequence[Record]) -> list[Record]:
    """Splits each pair into two labelled records: all chosen completions first, as in TRL."""

    def one(record, name):
        rest = {k: v for k, v in record.items() if k not in ("chosen", "rejected")}
        own = {"completion": record[name], "label": name == "chosen"}
        if "id" in record:
            own["id"] = f"{record['id']}:{name}"
        return rest | own

    return [one(record, name) for name in ("chosen", "rejected") for record in pairs]


def best_worst(ranked: Sequence[Record], *, min_gap: float = 1e-8) -> list[Record]:
    """Pairs each record's best and worst response; none if their scores differ by at most `min_gap`."""
    pairs = []
    for record in ranked:
        scores = record["scores"]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        pairs += _pair(record, best, worst, min_gap)
    return pairs


def all_pairs(ranked: Sequence[Record], *, min_gap: float = 1e-8) -> list[Record]:
    """Pairs every two responses whose scores differ by more than `min_gap`."""
    return [
        pair
        for record in ranked
        for i, j in itertools.permutations(range(len(record["scores"])), 2)
        for pair in _pair(record, i, j, min_gap)
    ]


def _pair(record, better, worse, min_gap):
    """Returns [the pair], or [] if the scores are too close or the texts are equal."""
    responses, scores = record["responses"], record["scores"]
    gap = scores[better] - scores[worse]
    if not gap > min_gap or responses[better] == responses[worse]:
        return []
    rest = {k: v for k, v in record.items() if k not in ("responses", "scores")}
    made = {"chosen": responses[better], "rejected": responses[worse]}
    made |= {"score_chosen": scores[better], "score_rejected": scores[worse]}
    if "id" in record:
        made["id"] = f"{record['id']}:{better}>{worse}"
    return [rest | made]


def _turns(value):
    """Converts a completion that is one message, as in LLaMA-Factory, to a list of messages."""
    value = list(value) if isinstance(value, tuple) else value
    return [value] if isinstance(value, Mapping) else value


def _asked(row):
    """Returns (column, prompt) of a pair, from any form; None: only the completions hold it."""
    prompt, given = row.get("prompt"), row.get("input")
    if prompt is not None:
        return "prompt", prompt
    if isinstance(row.get("conversations"), list):
        return "prompt", row.pop("conversations")
    if isinstance(given, Mapping) and isinstance(given.get("messages"), list):  # OpenAI's
        row |= {"tools": row.get("tools") or given.get("tools")}
        return "input", row.pop("input")["messages"]
    if row.get("instruction") is not None:
        parts = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("'instruction' and 'input' must be text.", "schema")
        content = "\n\n".join(filter(None, parts))
        return "instruction", [{"role": "user", "content": content}]
    if row.get("question") is not None:  # Intel's and Argilla's
        content = text_of(row["question"], "question")
        return "question", [{"role": "user", "content": content}]
    return "prompt", None


def _check_asked(given, prompt):
    """Raises DataError if a prompt of plain text is not that of the conversations beside it."""
    if not isinstance(given, str) or not given.strip():
        return
    texts = ["".join(str(m.get("content", m.get("value"))).split()) for m in prompt]
    asked = "".join(given.split())
    if not any(text and (text in asked or asked in text) for text in texts):
        raise DataError(
            "'prompt' is another question than that of the conversations in 'chosen' and 'rejected'; "
            "leave it out with --fields prompt ''.",
            "schema",
        )


def _check_question(row, chosen):
    """Raises DataError if the pair's question is in a column of another name."""
    for name in ("input", "query", "problem", "history", "post", "query_text"):
        value = row.get(name)
        begins = isinstance(chosen, str) and isinstance(value, str) and chosen.startswith(value)
        if isinstance(value, str) and value.strip() and not begins:
            raise DataError(
                f"there is no 'prompt', and the column {name!r} would not be shown; if the answers are to "
                f"it, map it with {flag({'question': name})}, else leave it out with --fields {name} ''.",
                "schema",
            )


def _is_chat(value) -> bool:
    return isinstance(value, (list, tuple))


def _opens(chosen) -> bool:
    """Returns whether a conversation contains its prompt, not only the answer."""
    first = chosen[0] if chosen else None
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and ROLES.get(role, role) != "assistant"


def _check_number(value, name, code="schema"):
    fine = isinstance(value, numbers.Real) and abs(value) < 1e30  # False for NaN
    if value is not None and not fine or (value is None and code == "nan_score"):
        raise DataError(f"{name} must be a finite number, got {value!r:.40}.", code)
