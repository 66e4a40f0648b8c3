"""Completions in labelled steps: the data of process reward models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxft.data.columns import absent, check_beside
from jaxft.data.errors import BadRecords, DataError
from jaxft.data.groups import TokenisedGroup
from jaxft.data.records import (
    CONTEXT,
    Record,
    check_record,
    own_columns,
    prompt_completion,
    renamed,
    shown_text,
)
from jaxft.data.rendering import Renderer, Tokenised


def normalise_steps(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record with `prompt`, `completions` (the steps, text) and `labels`, one per step.

    TRL's columns for stepwise supervision.

    Raises:
        DataError: if a column is absent or empty, or there is not one truth value per step.
    """
    row, names, mapped = renamed(raw, fields)
    for name in ("prompt", "completions", "labels"):
        if row.get(name) is None:
            raise absent(name, row)
    for name in ("completions", "labels"):
        if not isinstance(row[name], (list, tuple)):
            raise DataError(f"{name!r} must be a list, got {row[name]!r:.40}.", "schema")
    steps, labels = list(row["completions"]), list(row["labels"])
    if not steps or len(steps) != len(labels):
        raise DataError(
            f"{len(steps)} completions (steps) and {len(labels)} labels; expected one each.",
            "schema",
        )
    for step in steps:
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"a step must be text, got {step!r:.40}.", "schema")
    for label in labels:
        if isinstance(label, str) or label not in (True, False):
            raise DataError(f"a label must be true or false, got {label!r:.40}.", "schema")
    asked = prompt_completion(row, steps[0], names, "completions")["prompt"]
    own = {"prompt": asked, "completions": steps, "labels": [bool(x) for x in labels]}
    check_beside(row, ("prompt", "completions"), shown_text(own), mapped)
    return check_record(own_columns(row) | own)


def render_steps(
    records: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    *,
    separator: str = "\n",
    bad: BadRecords | None = None,
) -> list[TokenisedGroup]:
    """Renders records of `normalise_steps` as groups of one: prompt, then each step and a separator.

    The columns are `step_ends` [S], the index of each step's last token (its separator), and `step_labels`
    [S]; S is the maximum steps of a record; missing steps are -1 and False. Steps are encoded separately.

    Args:
        max_length: maximum tokens; longer records are dropped and counted in `bad`.

    Raises:
        DataError: if no record remains.
    """
    bad = BadRecords(loud=True) if bad is None else bad
    encode = lambda text: renderer.tokenizer.encode(text, add_special_tokens=False)
    made, total = [], 0
    for record in records:
        total += 1
        where = str(record.get("_where", record.get("id", f"record {total - 1}")))
        try:
            prompt = renderer.prompt({k: v for k, v in record.items() if k in ("prompt", *CONTEXT)})
        except DataError as error:
            if error.code is None:
                raise
            bad.add(where, error.code, str(error))
            continue
        steps = [encode(step.rstrip(separator) + separator) for step in record["completions"]]
        ends = len(prompt) - 1 + np.cumsum([len(step) for step in steps])
        if ends[-1] + 1 > max_length:
            bad.dropped["too_long"] += 1
            continue
        tokens = np.array([*prompt, *(token for step in steps for token in step)], np.int32)
        mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
        name = str(record.get("id", ""))
        made.append((Tokenised(tokens, mask, name), ends, np.array(record["labels"], bool)))
    bad.finish(total, len(made))
    most = max(len(ends) for _, ends, _ in made)

    def group(part, ends, labels):
        padding = (0, most - len(ends))
        columns = {
            "step_ends": np.pad(ends, padding, constant_values=-1).astype(np.int32),
            "step_labels": np.pad(labels, padding),
        }
        return TokenisedGroup((part,), columns, part.id)

    return [group(*one) for one in made]
