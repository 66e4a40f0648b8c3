"""Numbers written in words."""

from __future__ import annotations

import re

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: i for i, word in enumerate(_SMALL)} | {
    word: 10 * i for i, word in enumerate(_TENS, 2)
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
_WORD = "|".join([*_VALUES, *_SCALES, "hundred", "dozen"])
_RUN = re.compile(
    rf"(?i)(?P<sign>minus|negative|-)?\s*(?P<run>(?:an?\s+)?"
    rf"\b(?:(?:{_WORD})\b(?:[\s-]+(?:and\s+)?(?=(?:{_WORD})\b))?)+)"
)
_SMALLER = re.compile(r"(?:hundred|thousand|(?:m|b|tr)illion|\w+ie)ths?")  # five hundredths
_PART = re.compile(rf"(?i)[\s-]+({'|'.join(_PARTS)})s?\b")
_MORE = re.compile(
    rf"(?i)\s+and\s+(an?|{'|'.join(_SMALL[1:10])})[\s-]({'|'.join(_PARTS)})s?\b"  # and a half
)


def with_digits(text: str) -> str:
    """The text with its leading number in digits: "twenty-one", "two thirds", "five apples".

    At most one word may follow the number: "one of them" and "Seven Samurai" do not change.
    """
    if share := re.fullmatch(rf"(?i)(?:an?\s+)?({'|'.join(_PARTS)})", text):
        return f"1/{_PARTS[share[1].lower()]}" if " " in text or "half" in text.lower() else text
    if share := re.fullmatch(rf"(?i)(\d+)[\s-]({'|'.join(_PARTS)})s?( [a-z]+)?", text):
        return f"{share[1]}/{_PARTS[share[2].lower()]}{share[3] or ''}"
    found = _RUN.match(text)
    value = _value(re.findall(r"[a-z]+", found["run"].lower())) if found else None
    if value is None:
        return text
    number, end = str(value), found.end()
    if part := _PART.match(text, end):
        number, end = f"{value}/{_PARTS[part[1].lower()]}", part.end()
    elif more := _MORE.match(text, end):
        count = _VALUES.get(more[1].lower(), 1)
        number, end = f"{value} {count}/{_PARTS[more[2].lower()]}", more.end()
    rest = text[end:].strip(" .")
    if (
        _SMALLER.fullmatch(rest)
        or rest
        and not (re.fullmatch(r"[a-z%]+", rest) and text[end].isspace())
    ):
        return text
    return f"{'-' if found['sign'] else ''}{number} {rest}".strip()


def _value(words):
    """The number of the words, or None if they are not a number, such as "one two"."""
    if words[0] in ("a", "an"):
        words = ["one", *words[1:]]
        if len(words) < 2 or words[1] in _VALUES:
            return None
    total, group, last, ceiling = 0, None, 0, 10**15  # `last`: size of the word before
    for word in words:
        if word == "and":
            continue
        if word in _VALUES:
            small = _VALUES[word]
            fits = group is None or (last == 100) or (last == 10 and 0 < small < 10)
            if not fits:
                return None
            group, last = (group or 0) + small, 10 if small >= 20 else 1
        elif word in ("hundred", "dozen"):
            if group is None or group > 99 or last == 100:
                return None
            group, last = group * (100 if word == "hundred" else 12), 100
        else:
            if group is None or _SCALES[word] >= ceiling:
                return None
            ceiling = _SCALES[word]
            total, group, last = total + group * ceiling, None, 0
    return total + (group or 0)
