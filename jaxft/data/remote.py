"""Rows that come over a network: after a failure the reader waits, opens the source again and goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxft.data.errors import DataError

# What trying again does not mend: a missing data set, no permission, wrong options.
_LASTING = (FileNotFoundError, PermissionError, ValueError, TypeError, KeyError, ImportError)


def retried(
    open_rows: Callable[[int], Iterable[Any]],
    what: str,
    *,
    attempts: int = 5,
    wait: float = 1.0,
    sleep: Callable[[float], None] | None = None,
) -> Iterator[Any]:
    """The rows of `open_rows(0)`, each once and in order, through failures in between.

    Args:
        open_rows: (number of rows to leave out) -> the others.
        what: names the source in messages.
        attempts: failures in a row, with no row between them, after which it is an error.
        wait: seconds before the second attempt; doubled for each one after it.
        sleep: waits; default: time.sleep.

    Raises:
        DataError: after so many failures, or at one that lasts. A source that fails never looks like one
            that has ended.
    """
    given = failures = 0
    while True:
        try:
            for row in open_rows(given):
                yield row
                given, failures = given + 1, 0
            return
        except (
            Exception
        ) as error:  # Connections fail with errors of many libraries, of no common base.
            failures += 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, _LASTING) or failures >= attempts:
                tried = f" after {failures} attempts" if failures > 1 else ""
                place = f"row {given} cannot be read" if given else "cannot be read"
                raise DataError(f"{what}: {place}{tried} ({reason}).") from error
            (sleep or time.sleep)(wait * 2 ** (failures - 1))
