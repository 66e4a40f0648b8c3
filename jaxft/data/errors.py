"""The errors of the data layer, and the log of records that cannot be used."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import warnings

from jaxft.output import writing


class DataError(ValueError):
    """A data set or record cannot be used: the message says which, where, and what to do.

    `code` is set if a single record is at fault, so that a run may skip and count it: json, encoding,
    schema, role_order, empty_prompt, empty_completion, identical_pair, no_loss_tokens, too_long,
    template. Without a code the settings are wrong, and no record is skipped.
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """One record that cannot be used."""

    where: str  # "pairs.jsonl, line 4" or "rg:chain_sum, row 7"
    code: str  # "schema", "no_loss_tokens", "too_long", ...
    message: str


class BadRecords:
    """Collects bad records; raises at the first, or if the bad fraction exceeds `max_bad`.

    Args:
        max_bad: largest fraction that may be skipped; 0 raises at the first.
        loud: warns of records that were left out; set it if the caller does not print the summary.
    """

    def __init__(self, max_bad: float = 0.0, *, loud: bool = False):
        self.max_bad, self.loud = max_bad, loud
        self.records: list[BadRecord] = []
        self.dropped: collections.Counter[str] = (
            collections.Counter()
        )  # dropped by a policy, not bad

    def add(self, where: str, code: str, message: str) -> None:
        """Adds a bad record; raises DataError if none may be skipped."""
        if self.max_bad == 0:
            raise DataError(f"{where}: {message}")
        self.records.append(BadRecord(where, code, message[:200]))

    def check(self, total: int) -> None:
        """Raises DataError if too many of `total` records were bad."""
        if len(self.records) > self.max_bad * total:
            first = self.records[0]
            raise DataError(
                f"{len(self.records)} of {total} records are bad, more than max_bad={self.max_bad}; "
                f"the first: {first.where}: {first.message}"
            )

    def finish(self, total: int, kept: int) -> None:
        """Ends a rendering of `total` records, of which `kept` sequences remain.

        Raises:
            DataError: if too many were bad, or none remains.
        """
        self.check(total)
        summary = self.summary()
        if not kept:
            dropped = f" ({summary})" if summary else ""
            raise DataError(f"no usable record is left of {total}{dropped}; see max_length.")
        if self.loud and set(self.dropped) - {"truncated"}:  # Truncation was requested explicitly.
            warnings.warn(f"records left out or cut: {summary}, of {total}.", stacklevel=3)

    def summary(self) -> str:
        """Returns one line with the numbers skipped or dropped, by code; empty if none."""
        counts = collections.Counter(record.code for record in self.records) + self.dropped
        return ", ".join(f"{n} {code}" for code, n in sorted(counts.items()))

    def write(self, path: str | os.PathLike) -> None:
        """Appends the bad records to a JSONL file."""
        with writing(path), open(pathlib.Path(path), "a") as stream:
            for record in self.records:
                stream.write(json.dumps(dataclasses.asdict(record)) + "\n")
