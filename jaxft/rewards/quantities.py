"""Numbers as people and models write them: separators, fractions, percent, money, ranges."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from fractions import Fraction
from typing import NamedTuple

from jaxft.rewards.numerals import with_digits
from jaxft.rewards.units import Unit, read_unit

_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SHORT = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9, "tn": 10**12}
_MONEY = {"rs": "₹", "us$": "$", "inr": "₹", "usd": "$", "eur": "€", "gbp": "£", "jpy": "¥"}

_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2}){1,6},\d{3}(?!\d)|\d+"
_TOKEN = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-+]\s?)?
    (?:(?P<money>[$€£¥₹]|(?<![A-Za-z])(?:US\$|Rs\.?|USD|INR|EUR|GBP|JPY))\s?)?(?P<inner>(?<=[$€£¥₹])-)?
    (?:(?P<whole>\d+)\s+(?:and\s+)?(?P<part>\d+/[1-9]\d*)
      |(?:(?P<integer>{_INTEGER})(?P<decimals>\.\d+)?|(?P<only>\.\d+))
       (?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\s?[*xX]\s?10\s?\^\s?\{{?(?P<power>[-+]?\d+)\}}?)?
       (?:\s?/\s?(?P<denominator>[1-9]\d*))?)
    (?P<large>\s(?:thousand|million|billion|trillion|dozen)s?\b)?
    (?P<short>(?(money)(?:[kKmMbB]|mn|bn|tn)|(?:[kKMB]|mn|bn|tn))(?![\w^({{\\]))?
    (?P<gap>\s?)(?:(?P<unit>[%¢$€£¥₹]|[A-Za-z]+)(?:\^?\{{?[23]\}}?(?![\d.]\d))?)?""",
    re.VERBOSE,
)
_BEFORE = re.compile(  # texts before a number that make it part of something else, or deny it
    r"(?:[\w.:]|\d,|[\w)}\]]\s*[*+/^]\s*|\^\s*[-{]?|[√\\_{]\s*|[\w)}\]]\s+-\s+|"
    r"(?:\d|[+*/-]\s?)[a-z](?:\^\d)?\s*=\s*|[a-z]\^\{?\d\}?\s*=\s*|[<>≤≥]=?\s*|"
    r"(?:\\(?:pm|mp|[lg]eq?(?:slant)?|[lg]t|neq?)|±)\s*|"
    r"\d-\d+-|(?:\bnot|n't|≠|!=)\s+(?:be\s+)?|"
    # Strict bounds: "at least 5" answers how many are needed, "more than 5" does not.
    r"(?i:\b(?:(?:more|less|fewer|greater|larger|smaller|higher|lower)\s+than|over|under|above|below|"
    r"exceeds?)\s+))$"
)
_WRONG = re.compile(r"\s+(?:is|was)(?:n't|\s+(?:not|wrong|incorrect|false))\b")
_SHARES = re.compile(  # 5 hundredths are not 5; quarters may be coins
    r"(?:third|f(?:our|if)th|sixth|seventh|eighth|ninth|tenth|(?:hundred|thousand|million)th)s?\b"
)
_AFTER = re.compile(
    r"[_^\d]|[.:,]\d|\s*[*^/+]\s*[\w(\\]|\s?[\\({]|\s*[<>≤≥]=?\s*(?:[A-Za-z](?![A-Za-z>])|[\d-])"
)
_OTHER = re.compile(  # "4 or 5", "4 to 5" and "between 4 and 5" are not answers
    r"(?i)(?:\d\D{0,15}\b(?:or|to)\b\D{0,20}|\bbetween\b\D{0,10}\d[\d.,]*\D{0,15}\band\b\D{0,5})$"
)
_WORDS = re.compile(
    r"(?:(?:[%°$¢€£¥₹]|[A-Za-z]{1,2}|[a-z]{3,})[23]?(?:[\s/.-]+[a-z\d^]+|\^\{?\d\}?)*)?"
)


class Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    exact: bool  # written without a decimal point
    unit: Unit | None  # if it is known


def read_number(text: str, *, shorthand: bool = False) -> Quantity | None:
    """The number that the whole text states, with words after it as a unit; None for anything else.

    The text is that of `notation.plain`. "1,234", "$5", "3 1/2 cups", "1.5e3", "2 million", "-.5%" and
    "five" are numbers; "1,2", "3x", "4 or 5" and "12 Angry Men" are not. "$5k" is 5000; "5k", which
    may be five times k, only if `shorthand`.
    """
    text = re.sub(r"(?i)^(?:about|approximately|approx\.?|around|exactly|only|[=≈])\s*", "", text)
    text = with_digits(text.rstrip(" ."))
    text = re.sub(r"(?i)^(?:minus|negative)\s+(?=[\d.])", "-", text)
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):  # the thin spaces of ISO 80000
        text = text.replace(" ", "")
    found = _TOKEN.match(text)
    if not found:
        return None
    words = text[found.end("gap") :]
    words = words[read_unit(words)[1] :].strip(" .") if read_unit(words)[0] else words
    if not _WORDS.fullmatch(words):
        return None
    if re.search(r"\b(?:or|and|to|by)\b|\s\d", f" {words}"):  # 5 hours 30 minutes is more
        return None
    number = _quantity(found, text, shorthand)
    variable = re.match(r"[A-Za-z]{1,2}\b", words)  # 1/2 x; units have three letters or are known
    return None if variable and number else number


def last_number(text: str) -> Quantity | None:
    """The last number of a text, as GSM8K's graders take it; None if it is a part of something else.

    Parts of an expression, a ratio, a range, a list or "5 feet 4 inches", and the last number of "4
    or 5" and "not 5", are not answers. "5k" is 5000.
    """
    found = list(_TOKEN.finditer(text))
    if not found or _OTHER.search(text[: found[-1].start()][-60:]):
        return None
    last = _quantity(found[-1], text, shorthand=True)
    if last and last.unit and len(found) > 1:
        begin = found[-2].end("gap")
        unit, length = read_unit(text[begin:])
        between = text[begin + length : found[-1].start()].strip(" ,")
        if unit and unit.dimension == last.unit.dimension and between in ("", "and"):
            return None
    return last


def _quantity(match, text, shorthand):
    """The quantity of a match, or None if the text around it makes it something else."""
    part, unit = match.groupdict(), match["unit"] or ""
    begin = match.end("gap")
    money = part["money"] and _MONEY.get(part["money"].lower().rstrip("."), part["money"])
    known, length = read_unit(f"{money} {text[begin:]}" if money else text[begin:])
    end = max(begin + length - (2 if money else 0), begin)
    short = (part["short"] or "").lower()
    if short and not (money or shorthand):  # 5k is five times k
        return None
    if unit and not read_unit(text[begin:])[0]:
        if not match["gap"] and not re.match(r"[23]?\b", text[match.end() :]):
            return None
        if not match["gap"] and len(unit) < 3 and not short:  # 3x, 4th; but 5apples
            return None
        end = begin
    if _WRONG.match(text[match.start("gap") :]) or _SHARES.match(text[begin:]):
        return None
    if _BEFORE.search(text[: match.start()][-30:]) or (not unit and _AFTER.match(text[end:])):
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
    value *= _SHORT.get(short, 1)
    return Quantity(value, not (part["decimals"] or part["only"]), known)


def same_quantity(found: Quantity, wanted: Quantity) -> bool:
    """True if two numbers are the same.

    Units of one dimension are converted (50 cents are $0.50); quantities of different dimensions
    are never equal; a missing or unknown unit is not compared, as in the MATH and GSM8K graders.
    Percent: if only one side has the sign, 50 % is 50 and is 0.5, as the graders of Minerva and
    Qwen accept. Decimals: equal to six places, as in math-verify (0.333333 is 1/3, 0.33 is not),
    and to 0.1 %.
    """
    if found.unit and wanted.unit:
        kinds = {found.unit.dimension, wanted.unit.dimension}
        if kinds in ({"angle", "°C"}, {"angle", "°F"}):  # "10 degrees" names no scale
            return _close(found, wanted)
        value = found.value * found.unit.factor / wanted.unit.factor
        return len(kinds) == 1 and _close(found._replace(value=value), wanted)
    percents = [x for x in (found, wanted) if x.unit and x.unit.dimension == "%"]
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


def read_compound(text: str) -> Quantity | None:
    """The sum of "2 hours and 30 minutes" in the dimension's unit of factor 1; None for anything else.

    Each unit must be smaller than the one before, and each part smaller than one unit of the one
    before.
    """
    parts = [
        read_number(part)
        for part in re.split(r"(?<=[a-z.])(?:,\s*(?:and\s+)?|\s+and\s+|\s+(?=\d))", text)
    ]
    if len(parts) < 2 or any(part is None or part.unit is None or part.value < 0 for part in parts):
        return None
    if len({part.unit.dimension for part in parts}) > 1:
        return None
    for large, small in itertools.pairwise(parts):
        if small.value * small.unit.factor >= large.unit.factor or large.value.denominator != 1:
            return None
    total = sum(part.value * part.unit.factor for part in parts)
    return Quantity(total, parts[-1].exact, parts[0].unit._replace(factor=Fraction(1)))


def read_measure(text: str) -> Quantity | None:
    """A number with a known unit, compound or not; None for anything else."""
    number = read_number(text)
    return number if number and number.unit else read_compound(text)


def read_range(text: str) -> tuple[Quantity, Quantity] | None:
    """(least, greatest) of "10-15", "10 to 15" or "between 10 and 15 cm"; None for anything else."""
    between = re.match(r"(?i)(?:from|between)\s+", text)
    text = text[between.end() :] if between else text
    joint = r"\s*(?:-|\bto\b|\.\.+)\s*" + (r"|\s*\band\b\s*" if between else "")
    for match in re.finditer(rf"(?<=[\w%)])(?:{joint})(?=[\w$€£¥.-])", text):
        low, high = read_number(text[: match.start()]), read_number(text[match.end() :])
        if low and high and low.value < high.value:
            return (low if low.unit else low._replace(unit=high.unit)), high
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
