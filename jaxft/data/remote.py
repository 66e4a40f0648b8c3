"""Rows from a network: after a failure the reader waits, reopens the source and continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxft.data.errors import DataError

# Errors that a retry does not fix: a missing data set, no permission, wrong options.
_LASTING = (FileNotFoundError, PermissionError, ValueError, TypeError, KeyError, ImportError)


def retried(
    open_rows: Callable[[int], Iterable[Any]],
    what: str,
    *,
    attempts: int = 5,
    wait: float = 1.0,
    sleep: Callable[[float], None] | None = None,
) -> Iterator[Any]:
    """Yields the rows of `open_rows(0)`, each once and in order, despite transient failures.

    Args:
        open_rows: (number of rows to skip) -> the remaining rows.
        what: name of the source in messages.
        attempts: consecutive failures, without a row in between, after which it raises.
        wait: seconds before the second attempt; doubled for each further attempt.
        sleep: function that waits; default: time.sleep.

    Raises:
        DataError: after `attempts` failures, or at a permanent one, so that a failed source never looks
            like one that has ended.
    """
    given = failures = 0
    while True:
        try:
            for row in open_rows(given):
                yield row
                given, failures = given + 1, 0
            return
        except Exception as error:  # Libraries raise connection errors without a common base class.
            failures += 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, _LASTING) or failures >= attempts:
                tried = f" after {failures} attempts" if failures > 1 else ""
                place = f"row {given} cannot be read" if given else "cannot be read"
                raise DataError(f"{what}: {place}{tried} ({reason}).") from error
            (sleep or time.sleep)(wait * 2 ** (failures - 1))
