"""Intervals, unions of intervals, and equivalent inequalities."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_SIGNS = (
    (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=|=<", "≤"),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", "≥"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:neq|ne)(?![A-Za-z])|!=", "≠"),
    (r"\\(?:cup|bigcup)(?![A-Za-z])|(?<=[)\]}])\s*U\s*(?=[(\[{])", "∪"),
    (r"\\in(?![A-Za-z])", "∈"),
    (r"\\infty(?![A-Za-z])|\b(?:infinity|inf)\b", "∞"),
    (
        r"\\mathbb\s*\{?\s*R\s*\}?|\b(?:all|any|every) real (?:numbers?|values?)\b|\ball reals\b",
        "ℝ",
    ),
    (r"\\(?:mid|vert)(?![A-Za-z])", "|"),
    (r"\\(?:setminus|backslash)(?![A-Za-z])|∖", "-"),
)
_GREEK = "alpha|beta|gamma|theta|lambda|mu|phi|omega"
_NAME = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![a-z]))" r"(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?"


class Intervals(NamedTuple):
    """A set of reals."""

    name: str | None  # of the variable, if one is written
    parts: tuple[tuple[str, bool, str, bool], ...]  # (low, closed, high, closed) of each


def read_intervals(text: str) -> Intervals | None:
    r"""The set of "(1, 3]", "1 < x \le 3", "x > 1", "[0,1) \cup \{2\}", "x \ne 2" or "\mathbb{R}".

    None for anything else, such as an inequality of two variables or of an expression.
    """
    for pattern, sign in _SIGNS:
        text = re.sub(pattern, sign, text)
    text = text.strip()
    if builder := re.fullmatch(rf"\{{\s*({_NAME})\s*(?:∈\s*ℝ\s*)?[|:](.*)\}}", text):
        text = builder[2].strip()
    name = None
    if member := re.match(rf"({_NAME})\s*∈\s*", text):
        name, text = member[1].replace(" ", ""), text[member.end() :]
    if text == "ℝ":
        return Intervals(name, (("-∞", False, "∞", False),))
    if without := re.fullmatch(r"ℝ\s*-\s*\{([^{},;]+)\}", text):
        return Intervals(name, _all_but(without[1].strip()))
    if re.search("[<>≤≥≠]", text):
        return None if name else _inequalities(text)
    parts = [_interval(part.strip()) for part in text.split("∪")]
    if None in parts or (len(parts) == 1 and parts[0][0] == parts[0][2]):
        return None
    return Intervals(name, tuple(parts))


def _all_but(value):
    return ("-∞", False, value, False), (value, False, "∞", False)


def _interval(text):
    if point := re.fullmatch(r"\{([^{},;]+)\}", text):
        return point[1].strip(), True, point[1].strip(), True
    ends = re.fullmatch(r"([(\[\]])([^,;]+)[,;]([^,;]+)([)\]\[])", text)
    if not ends or re.search(r"[()\[\]]", re.sub(r"\([^()\[\]]*\)|\[\d\]", "", ends[2] + ends[3])):
        return None
    low, high = _end(ends[2]), _end(ends[3])
    return low, ends[1] == "[", high, ends[4] == "]"


def _end(text):
    text = text.strip()
    return text.lstrip("+ ") if "∞" in text else text


def _inequalities(text):
    """The intervals of inequalities joined by "or", or of two joined by "and" or a comma."""
    names, parts = set(), []
    for piece in re.split(r"\s*\bor\b\s*|∪", text):
        found = [
            _inequality(one) for one in re.split(r"\s*(?:[,;]|\band\b)\s*", piece.strip(" ,;"))
        ]
        if None in found or len(found) > 2:
            return None
        names |= {name for name, _ in found}
        (_, first), (_, last) = found[0], found[-1]
        if len(found) == 2:  # x > 1, x < 3
            if len(first) > 1 or len(last) > 1:
                return None
            (low,), (high,) = sorted((first, last), key=lambda one: one[0][0] == "-∞")
            if low[2] != "∞" or high[0] != "-∞":
                return None
            first = ((*low[:2], *high[2:]),)
        parts += first
    return Intervals(names.pop(), tuple(parts)) if len(names) == 1 else None


def _inequality(text):
    """(name, intervals) of "1 < x <= 3", "x > 1" or "x ≠ 1"; None for anything else."""
    terms = re.split(r"\s*([<>≤≥≠])\s*", text)
    if len(terms) not in (3, 5) or not all(term.strip() for term in terms):
        return None
    if terms[1] in ">≥":
        terms = [{">": "<", "≥": "≤"}.get(term, term) for term in reversed(terms)]
    signs = terms[1::2]
    if len(terms) == 5:
        low, name, high = terms[::2]
        if not set(signs) <= set("<≤"):
            return None
        parts, ends = ((low, signs[0] == "≤", high, signs[1] == "≤"),), low + high
    else:
        left, right = terms[::2]
        name, ends = (left, right) if re.fullmatch(_NAME, left) else (right, left)
        if signs[0] == "≠":
            parts = _all_but(ends)
        elif name == left:
            parts = (("-∞", False, right, signs[0] == "≤"),)
        else:
            parts = ((left, signs[0] == "≤", "∞", False),)
    variable = re.sub(r"_.*|\(.*", "", name)
    known = re.fullmatch(_NAME, name) and not re.search(
        rf"(?<![A-Za-z\\]){re.escape(variable)}(?![A-Za-z])", ends
    )
    return (name, parts) if known else None


def same_intervals(given: Intervals, gold: Intervals, same: Callable[[str, str], bool]) -> bool:
    """True if two sets have the same parts, in any order; `same` compares their ends.

    A variable counts only if both name one.
    """
    if len(given.parts) != len(gold.parts) or (
        given.name and gold.name and given.name != gold.name
    ):
        return False
    equal = lambda a, b: a[1::2] == b[1::2] and same(a[0], b[0]) and same(a[2], b[2])
    left = list(given.parts)
    for part in gold.parts:
        match = next((one for one in left if equal(one, part)), None)
        if match is None:
            return False
        left.remove(match)
    return True
