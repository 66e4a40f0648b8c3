"""Compares two texts, each an answer and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxft.rewards import choices, dates, intervals, quantities
from jaxft.rewards.mathematics import is_mathematics, same_mathematics
from jaxft.rewards.notation import plain
from jaxft.rewards.units import read_unit

LONGEST = 2000  # characters beyond which a text is an answer only if it equals the wanted one
DEEPEST = 20  # brackets within brackets
_GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|angle|triangle"
_NAME = (
    rf"(?:\\(?:{_GREEK})(?![a-z])\s*[A-Z]{{0,3}}|[A-Za-z]|[A-Z]{{2,4}})"
    r"(?:_\{?\w+\}?)?'*(?:\([^()=<>]{1,12}\))?"
)
_NAMED = re.compile(
    rf"({_NAME}(?:\s*:\s*{_NAME})*|\({_NAME}(?:\s*,\s*{_NAME})*\))\s*"
    r"(?:=(?![=<>])|(?:\\in(?![A-Za-z])|∈)(?=\s*\{))\s*"
)
_NAMED_TUPLE = re.compile(rf"\(({_NAME}(?:\s*,\s*{_NAME})+)\)\s*=\s*\(([^()]*)\)")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|±|\+/-")
_WRAPPED_UNIT = re.compile(
    r"\\(?:text\w*|mathrm|mbox|operatorname)\s*\{([^{}]*)\}\s*(\^\s*\{?\s*[23]\s*\}?)?[\s.$]*$"
)
_BARE_UNIT = re.compile(  # of two letters: the m of 2x m may be a variable
    r"(?<=[\w}!)])\s+((?:square |cubic |sq\.? |cu\.? )?[a-z]{2,}(?<!\bin)(?:\s*\^\s*\{?[23]\}?)?)$"
)


def same_value(found: str, wanted: str) -> bool:
    """True if two texts, each an answer and nothing else, are the same answer; see `same_answer`."""
    given, gold = plain(found), plain(wanted)
    if found.strip() == wanted.strip() or _key(given) == _key(gold):
        return bool(_key(gold) or found.strip() == wanted.strip())
    if not given or not gold or max(len(given), len(gold)) > LONGEST:
        return False
    if option := choices.labelled(gold):
        other = choices.labelled(given)
        if other:
            return option[0] == other[0] and same_value(other[1], option[1])
        return same_value(given, option[1])
    given, gold = _without_name(given, gold)
    for read, same in _KINDS:
        value = read(gold)
        if value is not None:
            other = read(given)
            if other is not None:
                return same(other, value)
    if _formula(given) and _formula(given) == _formula(gold):
        return True
    number = quantities.read_number(gold)
    power = quantities.arithmetic(gold) if number is None and "^" in gold else None
    if power is not None:  # 10^{-3}, which math-verify compares only as it is written
        number = quantities.Quantity(power, True, None)
        if (plainly := quantities.read_number(given)) and not plainly.unit:
            return quantities.same_quantity(plainly, number)
    if number is not None and (short := quantities.read_number(given, shorthand=True)):
        return quantities.same_quantity(short, number)
    exact = quantities.arithmetic(given)
    if exact is not None and number is not None and not quantities.read_range(given):
        return quantities.same_quantity(quantities.Quantity(exact, True, None), number)
    if bool(_EQUALS.search(given)) != bool(_EQUALS.search(gold)):
        return False
    units = [_unit(text) for text in (found, wanted)]
    if any(units):
        return _same_with_units(found, wanted, *units)
    if is_mathematics(given) or is_mathematics(gold):
        return _brackets_agree(given, gold) and same_mathematics(_latex(given), _latex(gold))
    return False


def is_expression(gold: str) -> bool:
    """True if comparing with a plain text takes more than numbers, words and lists of them."""
    return is_mathematics(gold) and not any(read(gold) for read, _ in _KINDS[:-2])


def _key(text):
    """The text, normalised for comparing words."""
    if not re.search(r"\d[A-Za-z](?!\w)", text):  # 5M is not 5m
        text = text.casefold()
    text = re.sub(r"(?<![\d)}])!$", "", text.rstrip(" .?\"'`*_;:,"))  # 5! is not 5
    text = re.sub(r"^[ !?\"'`*_;:,]*(?:\.(?!\d))?[ !?\"'`*_;:,]*", "", text)
    if (
        not re.search(r"\d", text)
        and re.fullmatch(r"[\w\s.,'\"!?;:&-]+", text)
        and re.search(r"[^\W_]{3}", text)
    ):
        text = re.sub(
            r"[.,'\"!?;:]", "", re.sub(r"(?<=\w)-(?=\w)", " ", text)
        )  # as SQuAD's graders do
        text = re.sub(r"^(?:the|an?) ", "", text)
    return " ".join(text.split())


def _without_name(given, gold):
    """Both without "x =", if only one of them has it, or both have the same."""
    one, other = _NAMED.match(given), _NAMED.match(gold)
    if one and other:
        same = one[1].replace(" ", "") == other[1].replace(" ", "")
        one_name = not (_NAMED.search(given, one.end()) or _NAMED.search(gold, other.end()))
        if same and one_name:
            given, gold = given[one.end() :], gold[other.end() :]
        else:
            return given, gold
    elif other and not _EQUALS.search(given) and not _NAMED.search(gold, other.end()):
        gold = gold[other.end() :]
    elif one and not _EQUALS.search(gold) and not _EQUALS.search(given, one.end()):
        given = given[one.end() :]
    if not _EQUALS.search(given) or _EQUALS.search(gold) or read_items(given):
        return given, gold
    first = _EQUALS.split(given)[0]
    variables = re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", first)  # 3x + 2y = 7 is not 7
    named = re.search(rf"(?:^|[A-Za-z]{{2,}}\s){_NAME}\s*$", first)
    joined = re.search(r",\s|;|\b(?:or|and)\b", given[len(first) :])  # x = 5 or y = 6 is not 6
    if (
        (named or not variables)
        and not joined
        and not re.search(r"[<>≤≥≠]|!=|\\(?:n?eq?|leq?|geq?|lt|gt)(?![a-z])", given)
    ):
        given = given.rpartition("=")[2].strip()
    return given, gold


def _formula(text):
    """A chemical formula with its digits on the line: H2O of H_2O and H_{2}O; None for other text."""
    text = re.sub(r"[_{}\s]|\\text|\\mathrm", "", text)
    return text if re.fullmatch(r"(?=.*\d)(?:[A-Z][a-z]?\d*|\((?=.*\))|\)\d*){2,}", text) else None


def _unit(text):
    """(unit or None, the text before it) of an expression with a unit; None without one."""
    if found := _WRAPPED_UNIT.search(text):
        before = text[: found.start()]
        words = plain(found[1] + (found[2] or ""))
        before = before.replace("$", "", 1) if before.count("$") % 2 else before
    elif found := _BARE_UNIT.search(text := plain(text)):
        before, words = text[: found.start()], found[1]
    else:
        return None
    expression = plain(before)
    if not (is_mathematics(expression) or quantities.read_number(expression)):  # prose
        return None
    if re.fullmatch(r"(?:(?:square|cubic|sq\.?|cu\.?) )?units?(?: ?\^ ?\{?[23]\}?)?", words):
        return None, before
    unit, length = read_unit(words)
    if unit is None or length != len(words) or unit.dimension == "%":
        return None
    return unit, before


def _same_with_units(found, wanted, given, gold):
    """True if two expressions, one or both with a unit, are the same; units are not converted."""
    if given and gold and given[0] and gold[0] and given[0] != gold[0]:
        return False
    return same_value(given[1] if given else found, gold[1] if gold else wanted)


def read_items(text: str) -> tuple[str, str, list[str]] | None:
    """(opening, closing, items) of a set, tuple, interval or list of two items or more, or a set.

    The text is that of `notation.plain`; 1 ± 2 is the list 1 + 2, 1 - 2. None for prose and anything else.
    """
    if found := _NAMED_TUPLE.fullmatch(text):  # (a, b) = (1, 2)
        names, values = (re.split(r"\s*,\s*", part.strip()) for part in found.groups())
        if len(names) == len(values):
            return "", "", [f"{name}={value}" for name, value in zip(names, values, strict=True)]
    if quantities.read_compound(text):  # 3 weeks and 2 days
        return None
    opening = closing = ""
    if text[:1] in "([{" and text[-1:] in ")]}" and _is_enclosed(text):
        opening, closing, text = text[0], text[-1], text[1:-1].strip()
    text = re.sub(r"(?i)\s*,?\s+\b(?:and|or)\b\s*|^(?:and|or)\s+", "; ", text)
    if not opening and re.search(
        r"[A-Za-z\d]\s*\(", re.sub(r"(?<![a-z])[a-z]\([^()]*\)\s*=", "", text)
    ):
        return None
    spaced = re.search(r",\s", text) and not opening == "("
    parts, depth = [""], 0
    for i, c in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(c, 0)
        if depth > DEEPEST:
            return None
        if c in ",;" and depth == 0 and (not spaced or text[i + 1 : i + 2].isspace() or c == ";"):
            parts.append("")
        else:
            parts[-1] += c
    parts = [sign for part in parts if part.strip() for sign in _both_signs(part.strip())]
    if len(parts) < 2 and (opening, closing) != ("{", "}"):
        return None
    if not opening and not all(len(part) <= 30 and len(part.split()) <= 3 for part in parts):
        return None  # prose
    return opening, closing, parts


def _both_signs(text):
    found = _PLUS_MINUS.findall(text)
    if len(found) != 1:
        return [text]
    return [_PLUS_MINUS.sub(sign, text).lstrip("+ ") for sign in "+-"]


def _is_enclosed(text):
    """True if the first bracket closes at the end, with a bracket of any shape."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _same_items(given, gold):
    (*ends, items), (*gold_ends, wanted) = given, gold
    if len(items) != len(wanted):
        return False
    names, gold_names = _names(items), _names(wanted)
    if names or gold_names:
        if not names or not gold_names:  # only the values, in alphabetical order of the names
            bare, values = (ends, items) if gold_names else (gold_ends, wanted)
            if any(map(_NAMED.match, values)):  # x = 1, x = 2 beside a = 1, b = 2
                return False
            in_order = list(names or gold_names) == sorted(names or gold_names)
            return bare[0] in ("", "(") and in_order and _all_same(_values(items), _values(wanted))
        values = dict(zip(names, _values(items), strict=True))
        return set(names) == set(gold_names) and all(
            same_value(values[name], value)
            for name, value in zip(gold_names, _values(wanted), strict=True)
        )
    items, wanted = _without_shared_name(items), _without_shared_name(wanted)
    if ends[0] and gold_ends[0] and ends != gold_ends:
        return False
    bracket, closing = ends if ends[0] else gold_ends
    if ends != gold_ends and bracket in "([":  # a list beside a tuple, or beside an interval
        values = [quantities.read_number(item) for item in (items if ends[0] else wanted)]
        point = len(values) > 2 or (None not in values and values[0].value >= values[1].value)
        if not point or bracket + closing not in ("()", "[]"):
            return False
    if bracket and bracket in "([":
        return _all_same(items, wanted)
    left = list(items)
    for one in wanted:
        match = next((x for x in left if same_value(x, one)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _names(items):
    """The names of "a=1, b=2", or None if an item has none or two have the same."""
    found = [_NAMED.match(item) for item in items]
    names = [match[1].replace(" ", "") for match in found if match]
    return names if len(names) == len(items) == len(set(names)) > 1 else None


def _values(items):
    return [item[match.end() :] if (match := _NAMED.match(item)) else item for item in items]


def _without_shared_name(items):
    """x=1, x=2 and x=1, 2 without the x."""
    names = {match[1] for item in items if (match := _NAMED.match(item))}
    return _values(items) if len(names) == 1 else items


def _all_same(items, wanted):
    return all(map(same_value, items, wanted))


def _same_range(given, gold):
    return all(map(quantities.same_quantity, given, gold))


def _equal(given, gold):
    return given == gold


# (reader of a kind, returning None for other kinds; comparison of two values of it)
_KINDS: tuple[tuple[Callable, Callable], ...] = (
    (quantities.read_number, quantities.same_quantity),
    (quantities.read_measure, quantities.same_quantity),
    (dates.read_date, _equal),
    (dates.read_time, _equal),
    (quantities.read_range, _same_range),
    (choices.read_choices, _equal),
    (
        intervals.read_intervals,
        lambda given, gold: intervals.same_intervals(given, gold, same_value),
    ),
    (read_items, _same_items),
)


def _brackets_agree(given, gold):
    """False for (1, 2) beside {1, 2}: math-verify reads a tuple as an open interval, and that as a set."""
    ends = [text[:1] + text[-1:] for text in (given, gold)]
    return not any({a, b} == {"()", "{}"} for a, b in [ends] if "," in given + gold)


def _latex(text):
    """Converts plain notation to LaTeX where they differ."""
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\w+)", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])|π", r"\\pi ", text)
    text = (
        text.replace("∞", r"\infty ")
        .replace("∪", r"\cup ")
        .replace("≤", r"\le ")
        .replace("≥", r"\ge ")
    )
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1", text)
    # math-verify reads the m of "2x m" as a unit and drops it.
    text = re.sub(r"(?<![A-Za-z\\])([a-z\d])\s+(?=[a-z](?![A-Za-z]))", r"\1 \\cdot ", text)
    text = re.sub(r"<=", r"\\le ", re.sub(r">=", r"\\ge ", text))
    if text.startswith("{") and text.endswith("}"):
        text = rf"\{{{text[1:-1]}\}}"
    return text.replace("*", r"\cdot ").replace("%", r"\%")
