"""Records of preferences: pairs, single completions with a label, ranked completions."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.errors import DataError
from jaxft.data.records import Record, check_record, normalise, prompt_completion

_ALTERNATIVES = {"chosen": ("preferred", "accepted", "win"), "rejected": ("dispreferred", "lose")}


def normalise_pair(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """A record with `prompt`, `chosen`, `rejected`, each text or each messages; the rest is kept.

    TRL's columns. Without a `prompt`, or where that repeats as text what both conversations begin with, the
    prompt is what they have in common: the longest common run of messages, or of characters up to a blank.
    `margin`, if there is one, must be a number.

    Args:
        raw: the row as read.
        fields: our name -> the row's; see `normalise`.

    Raises:
        DataError: if a column is absent, empty or of the wrong kind, or both completions are the same.
    """
    row, inner = _renamed(raw, fields)
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(_absent(name, row))
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    implicit = prompt is None or (_is_chat(chosen) and isinstance(prompt, str) and _opens(chosen))
    if implicit:
        prompt, chosen, rejected = common_prompt(chosen, rejected)
    first = prompt_completion(prompt, chosen, inner, "chosen")
    second = prompt_completion(prompt, rejected, inner, "rejected")
    if first["completion"] == second["completion"]:
        raise DataError("'chosen' and 'rejected' are the same.", "identical_pair")
    if isinstance(first["completion"], list) != isinstance(second["completion"], list):
        raise DataError("'chosen' and 'rejected' must both be text or both be messages.", "schema")
    _check_number(row.get("margin"), "margin")
    pair = {"chosen": first["completion"], "rejected": second["completion"]}
    return check_record(row | {"prompt": first["prompt"]} | pair)


def normalise_unpaired(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """A record with `prompt`, `completion` and `label`: True where the completion is desirable.

    Raises:
        DataError: see `normalise`; and if the label is no truth value.
    """
    row, inner = _renamed(raw, fields)
    if "label" not in row:
        raise DataError(_absent("label", row))
    if isinstance(row["label"], str) or row["label"] not in (True, False):
        raise DataError(f"'label' must be true or false, got {row['label']!r:.40}.", "schema")
    return normalise(row, inner) | {"label": bool(row["label"])}


def normalise_ranked(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """A record with `prompt`, `responses` and their `scores`, for `best_worst` and `all_pairs`.

    Raises:
        DataError: if a column is absent, or scores are not one finite number for each response.
    """
    row, inner = _renamed(raw, fields)
    for name in ("prompt", "responses", "scores"):
        if name not in row:
            raise DataError(_absent(name, row))
    responses, scores = list(row["responses"]), list(row["scores"])
    if len(responses) != len(scores) or len(scores) < 2:
        raise DataError(
            f"{len(responses)} responses and {len(scores)} scores; expected at least two of both.",
            "schema",
        )
    for i, score in enumerate(scores):
        _check_number(score, f"scores[{i}]", "nan_score")
    made = [prompt_completion(row["prompt"], r, inner, "responses") for r in responses]
    texts = [m["completion"] for m in made]
    return check_record(row | {"prompt": made[0]["prompt"], "responses": texts, "scores": scores})


def common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """(prompt, rest of chosen, rest of rejected): what both begin with, messages or text.

    A blank before the completions belongs to them, as in TRL.

    Raises:
        DataError: if they have nothing in common, or one of them is all prompt.
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
            "there is no 'prompt', and 'chosen' and 'rejected' have no beginning in common.",
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
    """Two records with a label of each pair: all chosen completions first, as TRL orders them."""

    def one(record, name):
        rest = {k: v for k, v in record.items() if k not in ("chosen", "rejected")}
        own = {"completion": record[name], "label": name == "chosen"}
        if "id" in record:
            own["id"] = f"{record['id']}:{name}"
        return rest | own

    return [one(record, name) for name in ("chosen", "rejected") for record in pairs]


def best_worst(ranked: Sequence[Record], *, min_gap: float = 1e-8) -> list[Record]:
    """A pair of each record's best and worst response; records whose scores are closer give none."""
    pairs = []
    for record in ranked:
        scores = record["scores"]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        pairs += _pair(record, best, worst, min_gap)
    return pairs


def all_pairs(ranked: Sequence[Record], *, min_gap: float = 1e-8) -> list[Record]:
    """A pair of every two responses whose scores differ by more than `min_gap`."""
    return [
        pair
        for record in ranked
        for i, j in itertools.permutations(range(len(record["scores"])), 2)
        for pair in _pair(record, i, j, min_gap)
    ]


def _pair(record, better, worse, min_gap):
    """[the pair], or [] if the scores are too close or the texts the same."""
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


def _renamed(raw, fields):
    """(row with our column names, names inside messages)."""
    fields = dict(fields or {})
    inner = {name: fields.pop(name) for name in ("role", "content") if name in fields}
    row = dict(raw)
    for ours, theirs in fields.items():
        if theirs not in row:
            raise DataError(f"no column {theirs!r} among {sorted(row)}.")
        row[ours] = row.pop(theirs)
    return row, inner


def _is_chat(value) -> bool:
    return isinstance(value, (list, tuple))


def _opens(chosen) -> bool:
    """Whether a conversation has its prompt in it, rather than being the answer alone."""
    first = chosen[0] if chosen else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) != "assistant"


def _absent(name, row) -> str:
    close = next((c for c in _ALTERNATIVES.get(name, ()) if c in row), "...")
    return f"no column {name!r} among {sorted(row)}; map yours with fields={{{name!r}: {close!r}}}."


def _check_number(value, name, code="schema"):
    fine = isinstance(value, numbers.Real) and math.isfinite(value)
    if value is not None and not fine or (value is None and code == "nan_score"):
        raise DataError(f"{name} must be a finite number, got {value!r:.40}.", code)
