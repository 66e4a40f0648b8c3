"""Held-out records: those of --eval-data, or a part of the training data; and their description."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.cli import choices, flags
from jaxft import data

# reasoning-gym draws entry i from seed + i: seeds of parts must differ by more than their sizes.
NEEDLE = "rg:needle_haystack?min_num_statements=4&max_num_statements=8"
EVAL = f"{NEEDLE}&size=100&seed=1000000"  # evaluation data if --data is not given
SHARE, MOST = 0.1, 200  # fraction and maximum of held-out records if --validation is not given
FEWEST = 0.1  # fraction of the records that must remain to train on


class Parts(NamedTuple):
    """Training records of each source, held-out records, and their name: "40 held-out records of x"."""

    training: list[list]
    held_out: list
    name: str


def with_held_out(
    config: Any, sources: list[list], load: Callable[[str], list], ask: Callable[[Any], str]
) -> Parts:
    """Separates held-out records, --eval-data or a part of each source, and prints which.

    Without --eval-data, a script's default data have their own held-out task. The user's data give a tenth of
    their questions, at most 200 records, or the fraction --validation. Held-out records whose question also
    trains are excluded, because they would measure memory.

    Raises:
        DataError: if no held-out record remains.
        ValueError: if both --validation and --eval-data are given.
    """
    settings = flags.flat(config)
    share, specs = settings["validation"], _specs(config)
    named = config.eval_data
    if named and share is not None:
        raise ValueError(
            f"--validation {share} has no effect with --eval-data {named}; give one of them."
        )
    if named is None and share is None and "data" not in choices.given(config):
        named = EVAL
    if not specs:
        raise data.DataError("--data names no source; give a file, rg:TASK or a hub id.")
    total = sum(map(len, sources))
    if settings.get("preview"):  # Nothing is evaluated.
        return Parts(sources, sources[0], "")
    if named:
        held_out, of = load(named), f"records of {shown(named)}"
    else:
        pairs = [part(records, ask, share, MOST / total) for records in sources]
        sources, held_out = [pair[0] for pair in pairs], [r for pair in pairs for r in pair[1]]
        of = f"held-out records of {', '.join(map(shown, specs))}"
        if not held_out or not all(sources):
            asked = len({ask(record) for pair in pairs for part in pair for record in part})
            raise data.DataError(
                f"{', '.join(specs)}: {total} records cannot be split into training and held-out records "
                f"(different questions: {asked}); give more records, another --validation, or --eval-data."
            )
    known = {ask(record) for records in sources for record in records}
    left = without_known(held_out, known, ask)
    name = f"{len(left)} {of}"
    also = f" ({len(held_out) - len(left)} more also occur in training)"
    print(
        f"training on {sum(map(len, sources))} records of {', '.join(map(shown, specs))}; evaluated on "
        f"{name}{also if len(left) < len(held_out) else ''}",
        flush=True,
    )
    return Parts(sources, left, name)


def part(
    records: Sequence[Any], ask: Callable[[Any], str], share: float | None, most: float = 1.0
) -> tuple[list, list]:
    """Returns (training, held out); holds out the questions with the smallest hashes, so always the same.

    Args:
        records: records of one source.
        ask: record -> its question; records with the same question are on the same side.
        share: fraction of the records; None: `SHARE`, at most `most` and at least one record.
    """
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--validation must lie between 0 and 1, got {share}.")
    number = round(len(records) * (min(SHARE, most) if share is None else share))
    digest = lambda text: hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    groups: dict[bytes, int] = {}
    keys = [digest(ask(record)) for record in records]
    for key in keys:
        groups[key] = groups.get(key, 0) + 1
    held, count = set(), 0
    for key in sorted(groups):
        if count >= max(number, 1) or len(held) == len(groups) - 1:
            break
        held.add(key)
        count += groups[key]
    pick = lambda side: [r for r, key in zip(records, keys, strict=True) if (key in held) is side]
    return pick(False), pick(True)


def without_known(held_out: list, known: set[str], ask: Callable[[Any], str]) -> list:
    """Returns held-out records whose question is not in `known`; raises DataError if none remains."""
    left = [record for record in held_out if ask(record) not in known]
    if not left:
        raise data.DataError("every held-out record is also in the training data.")
    return left


def tell_of(bad: data.BadRecords, kept: int, total: int, what: str = "training") -> None:
    """Prints how many records were dropped or truncated, if any.

    Raises:
        DataError: if fewer than a tenth of the records remain.
    """
    if not bad.summary():
        return
    if kept < FEWEST * total:
        raise data.DataError(
            f"only {kept} of {total} {what} records are left ({bad.summary()}); raise --max-length, choose "
            "another --too-long, or look at the records with --preview."
        )
    print(
        f"{what} records left out or cut: {bad.summary()}; {kept} of {total} are left", flush=True
    )


def tell_of_columns(config: Any, sources: Sequence[list]) -> None:
    """Prints the user's columns that look like training text but are not shown to the model."""
    for spec, records in zip(_specs(config), sources, strict=True):
        if not spec.startswith("rg:") and (names := data.not_shown(records)):
            print(f"columns of {shown(spec)} that the model is not shown: {names}", flush=True)


def question(record: Mapping[str, Any], messages: Any) -> str:
    """Returns the question of a record: its user turns, its prompt or its text."""
    if messages is None:
        names = ("prompt", "text", "tokens")
        return str(next((record[name] for name in names if name in record), ""))
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


def shown(spec: str) -> str:
    """Returns a source's name for output: without options, and only the last part of a path."""
    if spec.startswith(("rg:", "tfds:")):
        return spec.split("?")[0]
    return pathlib.Path(spec).name or spec


def _specs(config):
    return [config.data] if isinstance(config.data, str) else list(config.data)
