"""Dates and times of day as people write them."""

from __future__ import annotations

import re

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_NAMES = (
    "january february march april june july august september october november december sept "
    + " ".join(_MONTHS)
).split()
_MONTH = rf"(?P<month>{'|'.join(sorted(_NAMES, key=len, reverse=True))})\b\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{4})"
_DATES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<year>\d{4})[-/](?P<month>\d{1,2})(?:[-/](?P<day>\d{1,2}))?",
        rf"{_MONTH}\s+{_DAY}(?:,?\s+{_YEAR})?",
        rf"(?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}(?:,?\s+{_YEAR})?",
        rf"{_MONTH},?\s+{_YEAR}",
    )
)
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s*(?:([ap])\.?\s?m\b\.?)?")


def read_date(text: str) -> tuple[int | None, int, int | None] | None:
    """(year, month, day) of "2020-03-05", "March 5th, 2020", "5 March" or "May 2020"; None for other text.

    A missing part is None. 3/5/2020 is not read: its first number may be the month or the day.
    """
    for pattern in _DATES:
        if match := pattern.fullmatch(text.casefold().strip(". ")):
            part = {"year": None, "day": None} | match.groupdict()
            month = part["month"]
            number = int(month) if month.isdigit() else _MONTHS.index(month[:3]) + 1
            if not 1 <= number <= 12:
                return None
            year, day = (part[name] and int(part[name]) for name in ("year", "day"))
            return year, number, day
    return None


def read_time(text: str) -> tuple[int, int, int, bool] | None:
    """(hour, minute, second, whether a.m. or p.m. is known) of "3:30 p.m." or "15:30"; None otherwise."""
    match = _TIME.fullmatch(text.casefold().strip())
    if not match or not (match[2] or match[4]):
        return None
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    if hour > 24 or minute > 59 or second > 59 or (match[4] and not 1 <= hour <= 12):
        return None
    if match[4]:
        hour = hour % 12 + 12 * (match[4] == "p")
    return hour, minute, second, bool(match[4]) or hour > 12
