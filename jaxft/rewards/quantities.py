"""Numbers as people and models write them: separators, fractions, percent, money, units, ranges, dates."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction
from typing import NamedTuple

_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# dimension -> names of a unit -> its factor
_MEASURES = {
    "length": {
        "mm millimeter millimetre": "1/1000",
        "cm centimeter centimetre": "1/100",
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        "in inch inches": "127/5000",
        "ft foot feet": "381/1250",
        "yd yard": "1143/1250",
        "mi mile": "201168/125",
    },
    "time": {
        "ms millisecond": "1/1000",
        "s sec second": "1",
        "min minute": "60",
        "h hr hour": "3600",
        "day": "86400",
        "week": "604800",
    },
    "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000"},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "angle": {"deg degree": "1"},
    "$": {"$ dollar usd": "1", "cent ¢": "1/100"},
    "€": {"€ euro eur": "1"},
    "£": {"£ gbp": "1"},
    "¥": {"¥ yen jpy": "1"},
    "₹": {"₹ rupee inr": "1"},
    "%": {"% percent pct": "1/100"},
}
_UNITS = {
    name + end: (dimension, Fraction(factor))
    for dimension, units in _MEASURES.items()
    for names, factor in units.items()
    for name in names.split()
    for end in (("", "s") if len(name) > 2 else ("",))
}

_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2}){1,6},\d{3}(?!\d)|\d+"
_TOKEN = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-+]\s?)?
    (?:(?P<money>[$€£¥₹])\s?)?(?P<inner>(?<=[$€£¥₹])-)?
    (?:(?P<whole>\d+)\s+(?:and\s+)?(?P<part>\d+/[1-9]\d*)
      |(?:(?P<integer>{_INTEGER})(?P<decimals>\.\d+)?|(?P<only>\.\d+))
       (?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\s?[*xX]\s?10\s?\^\s?\{{?(?P<power>[-+]?\d+)\}}?)?
       (?:\s?/\s?(?P<denominator>[1-9]\d*))?)
    (?P<large>\s(?:thousand|million|billion|trillion)s?\b)?
    (?P<gap>\s?)(?:(?P<unit>[%¢$€£¥₹]|[A-Za-z]+)(?:\^?\{{?[23]\}}?(?![\d.]\d))?)?""",
    re.VERBOSE,
)
_BEFORE = re.compile(  # what makes a number a part of something else, or denies it
    r"(?:[\w.:]|\d,|[\w)}\]]\s*[*+/^]\s*|\^\s*[-{]?|[√\\_{]\s*|[\w)}\]]\s+-\s+|"
    r"\d[a-z](?:\^\d)?\s*=\s*|\d-\d+-|(?:\bnot|n't|≠|!=)\s+(?:be\s+)?)$"
)
_WRONG = re.compile(r"\s+(?:is|was)(?:n't|\s+(?:not|wrong|incorrect|false))\b")
_AFTER = re.compile(r"[_^\d]|[.:,]\d|\s*[*^/+]\s*[\w(\\]|\s?[\\({]")
_OTHER = re.compile(r"\d\D{0,15}\bor\b\D{0,20}$")  # "4 or 5" is no answer
_WORDS = re.compile(
    r"(?:(?:[%°$¢€£¥₹]|[A-Za-z]{1,2}|[a-z]{3,})[23]?(?:[\s/.-]+[a-z\d^]+|\^\{?\d\}?)*)?"
)


class Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    exact: bool  # written without a decimal point
    unit: tuple[str, Fraction] | None  # (dimension, factor), if it is known


def read_number(text: str) -> Quantity | None:
    """The number that the whole text is, with words behind it as a unit; None for anything else.

    The text is that of `notation.plain`. "1,234", "$5", "3 1/2 cups", "1.5e3", "2 million" and "-.5%" are
    numbers; "1,2", "3x", "4 or 5" and "12 Angry Men" are none.
    """
    text = re.sub(r"(?i)^(?:about|approximately|approx\.?|around|exactly|only|[=≈])\s*", "", text)
    text = text.rstrip(" .")
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):  # the thin spaces of ISO 80000
        text = text.replace(" ", "")
    found = _TOKEN.match(text)
    words = text[found.end("gap") :] if found else ""
    if not found or not _WORDS.fullmatch(words):
        return None
    if re.search(r"\b(?:or|and|to|by)\b|\s\d", words):  # 5 hours 30 minutes is more than 5 hours
        return None
    number = _quantity(found, text)
    variable = re.match(r"[A-Za-z]{1,2}\b", words)  # 1/2 x; units have three letters or are known
    return None if variable and number and not number.unit else number


def last_number(text: str) -> Quantity | None:
    """The last number of a text, as GSM8K's graders take it; None if it is a part of something else.

    A part of an expression, of a ratio or a list, and the last of "4 or 5" and "not 5", are no answer.
    """
    found = list(_TOKEN.finditer(text))
    if not found or _OTHER.search(text[: found[-1].start()][-60:]):
        return None
    return _quantity(found[-1], text)


def _quantity(match, text):
    """The quantity of a match, or None if what stands around it makes it something else."""
    part, unit = match.groupdict(), match["unit"] or ""
    known = _UNITS.get(unit, _UNITS.get(unit.lower()))
    rest = text[match.end() :]
    if unit == "in" and rest.strip(" ."):  # the preposition
        known = None
    if unit and not known:
        if not match["gap"] and not re.match(r"[23]?\b", rest):
            return None
        if not match["gap"] and len(unit) < 3:  # 3x, 4th; but 5apples
            return None
        rest = text[match.end("gap") :]
    if _WRONG.match(text[match.start("gap") :]):
        return None
    if _BEFORE.search(text[: match.start()][-30:]) or (not unit and _AFTER.match(rest)):
        return None
    if part["whole"]:
        value = Fraction(part["whole"]) + Fraction(part["part"])
    else:
        digits = (part["integer"] or "").replace(",", "") + (part["decimals"] or part["only"] or "")
        shift = int(part["exponent"] or part["power"] or 0)
        if abs(shift) > 400 or len(digits) > 1000:
            return None
        value = Fraction(digits) * Fraction(10) ** shift / int(part["denominator"] or 1)
    value *= _LARGE.get((part["large"] or "").strip().rstrip("s"), 1)
    value *= -1 if "-" in (part["sign"] or part["inner"] or "") else 1
    if part["money"] and not (known and known[0] == part["money"]):
        known = _UNITS[part["money"]]
    return Quantity(value, not (part["decimals"] or part["only"]), known)


def same_quantity(found: Quantity, wanted: Quantity) -> bool:
    """Whether two numbers are the same.

    Units: of one dimension they are converted (50 cents are $0.50); of two dimensions nothing is equal; one
    that is missing or unknown is not compared, as in the MATH and GSM8K graders. Percent: where one side
    alone has the sign, 50 % is 50 and is 0.5, as in math-verify and the graders of Minerva and Qwen.
    Decimals: equal to six places, as in math-verify (0.333333 is 1/3, 0.33 is not), and to 0.1 %.
    """
    if found.unit and wanted.unit:
        if found.unit[0] != wanted.unit[0]:
            return False
        scaled = lambda x: x._replace(value=x.value * x.unit[1])
        return _close(scaled(found), scaled(wanted))
    percents = [x for x in (found, wanted) if x.unit and x.unit[0] == "%"]
    if percents:
        (percent,) = percents
        other = wanted if percent is found else found
        hundredth = percent._replace(value=percent.value / 100)
        return _close(percent, other) or _close(hundredth, other)
    return _close(found, wanted)


def _close(a, b):
    if a.value == b.value:
        return True
    if a.exact and b.exact:
        return False
    rounded = round(a.value, 6) == round(b.value, 6)
    return rounded and abs(a.value - b.value) <= abs(b.value) / 1000


def read_range(text: str) -> tuple[Quantity, Quantity] | None:
    """(least, greatest) of "10-15", "10 to 15" or "between 10 and 15 cm"; None for anything else."""
    between = re.match(r"(?i)(?:from|between)\s+", text)
    text = text[between.end() :] if between else text
    joint = r"\s*(?:-|\bto\b|\.\.+)\s*" + (r"|\s*\band\b\s*" if between else "")
    for match in re.finditer(rf"(?<=[\w%)])(?:{joint})(?=[\d$€£¥.-])", text):
        low, high = read_number(text[: match.start()]), read_number(text[match.end() :])
        if low and high and low.value < high.value:
            return (low if low.unit else low._replace(unit=high.unit)), high
    return None


_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = rf"(?P<month>(?:{'|'.join(_MONTHS)})[a-z]*)\.?"
_DATES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<year>\d{4})[-/](?P<month>\d{1,2})[-/](?P<day>\d{1,2})",
        rf"{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<year>\d{{4}})",
        rf"(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?\s+(?P<year>\d{{4}})",
    )
)


def read_date(text: str) -> tuple[int, int, int] | None:
    """(year, month, day) of "2020-03-05", "March 5th, 2020" or "5 March 2020"; None for anything else."""
    for pattern in _DATES:
        if match := pattern.fullmatch(text.casefold().rstrip(". ")):
            month = match["month"]
            number = int(month) if month.isdigit() else _MONTHS.index(month[:3]) + 1
            return int(match["year"]), number, int(match["day"])
    return None


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def arithmetic(text: str) -> Fraction | None:
    """The exact value of an expression of numbers, + - * / ^ and brackets; None for anything else."""
    text = text.replace("{", "(").replace("}", ")").replace("^", "**")
    if not re.fullmatch(r"[\d+*/(). -]{1,200}", text):
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, KeyError):
        return None


def _value(node, text):
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(text.strip(), node))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, text))
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, right = _value(node.left, text), _value(node.right, text)
    if not isinstance(node.op, ast.Pow):
        return _OPERATORS[type(node.op)](left, right)
    if right.denominator != 1 or abs(right) > 64 or max(abs(left), 1) > 10**9:
        raise ValueError("too large")
    return left ** int(right)
