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
    """A data set or record that cannot be used: says which, where, and what to do.

    `code` is set where one record is to blame, so that a run may skip and count it: json, encoding,
    schema, role_order, empty_prompt, empty_completion, identical_pair, no_loss_tokens, too_long,
    template. Without a code it is the settings that are wrong, and no record is skipped for it.
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
    """Collects bad records; raises at the first, or once more than a share of all is bad.

    Args:
        max_bad: largest share that may be skipped; 0 raises at the first.
        loud: warn of records that were left out, since nobody else will read the summary.
    """

    def __init__(self, max_bad: float = 0.0, *, loud: bool = False):
        self.max_bad, self.loud = max_bad, loud
        self.records: list[BadRecord] = []
        self.dropped: collections.Counter[str] = collections.Counter()  # by a policy, not bad

    def add(self, where: str, code: str, message: str) -> None:
        """Notes a bad record; raises DataError if none may be skipped."""
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
        """Ends a rendering of `total` records, of which `kept` sequences are left.

        Raises:
            DataError: if too many were bad, or nothing is left.
        """
        self.check(total)
        summary = self.summary()
        if not kept:
            dropped = f" ({summary})" if summary else ""
            raise DataError(f"no usable record is left of {total}{dropped}; see max_length.")
        if self.loud and set(self.dropped) - {"truncated"}:  # Cutting was asked for by name.
            warnings.warn(f"records left out or cut: {summary}, of {total}.", stacklevel=3)

    def summary(self) -> str:
        """One line: how many were skipped or dropped, by code; empty if none."""
        counts = collections.Counter(record.code for record in self.records) + self.dropped
        return ", ".join(f"{n} {code}" for code, n in sorted(counts.items()))

    def write(self, path: str | os.PathLike) -> None:
        """Appends the bad records to a JSONL file."""
        with writing(path), open(pathlib.Path(path), "a") as stream:
            for record in self.records:
                stream.write(json.dumps(dataclasses.asdict(record)) + "\n")
