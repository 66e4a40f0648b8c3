"""Units of measurement: dimension and factor of "km/h", "square feet" and "10 degrees C"."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

# dimension -> names of a unit -> its factor
_MEASURES = {
    "length": {
        "mm millimeter millimetre": "1/1000",
        "cm centimeter centimetre": "1/100",
        "dm decimeter decimetre": "1/10",
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
    "mass": {
        "mg milligram": "1/1000",
        "g gram": "1",
        "kg kilogram": "1000",
        "oz ounce": "45359237/1600000",
        "lb pound": "45359237/100000",
    },
    "length^3": {
        "ml milliliter millilitre cc": "1/1000000",
        "l liter litre": "1/1000",
        "gal gallon": "473176473/125000000000",
        "quart": "473176473/500000000000",
        "pint": "473176473/1000000000000",
    },
    "length time^-1": {"mph": "1397/3125", "kph kmh": "5/18"},
    "angle": {"deg degree °": "1"},
    "radian": {"rad radian": "1"},
    "$": {"$ dollar usd": "1", "cent ¢": "1/100"},
    "€": {"€ euro eur": "1"},
    "£": {"£ gbp": "1"},
    "¥": {"¥ yen jpy": "1"},
    "₹": {"₹ rupee inr rs": "1"},
    "%": {"% percent percentage pct": "1/100"},
}
_UNITS = {
    name + end: (dimension, Fraction(factor))
    for dimension, units in _MEASURES.items()
    for names, factor in units.items()
    for name in names.split()
    for end in (("", "s") if len(name) > 2 else ("",))
} | {"lbs": ("mass", Fraction(45359237, 100000)), "rs": ("₹", Fraction(1))}
_TEMPERATURE = re.compile(r"(?:degrees?|deg|°)\s*(?:([CF])\b|([CcFf])(?:elsius|ahrenheit)\b)")
_PIECE = re.compile(
    r"\s*(?P<over>/|\bper\b)?\s*(?P<shape>(?:square|cubic|sq|cu)\b\.?)?\s*"
    r"(?P<name>[A-Za-z]+|[%¢$€£¥₹°])(?:\.(?=\s*$))?\s*"
    r"(?:\^\s*\{?\s*(?P<power>-?\d)\s*\}?|(?P<digit>[23])(?!\w))?"
)


class Unit(NamedTuple):
    """A dimension, such as "length^2" or "length time^-1", and the unit's size in units of factor 1."""

    dimension: str
    factor: Fraction


def read_unit(text: str) -> tuple[Unit | None, int]:
    """(the unit at the start of the text, its number of characters); (None, 0) if there is none.

    "cm^2", "square feet", "km/h", "miles per hour", "m s^{-1}" and "degrees C" are units; in "cm
    long" the first two characters are. Any word may follow "per": "$5 per apple" is not $5.
    """
    if heat := _TEMPERATURE.match(text):
        return Unit("°" + (heat[1] or heat[2]).upper(), Fraction(1)), heat.end()
    powers, factor, end = {}, Fraction(1), 0
    while piece := _PIECE.match(text, end):
        known = _UNITS.get(piece["name"], _UNITS.get(piece["name"].lower()))
        unit = Unit(*known) if known else None
        over = bool(piece["over"])
        if not powers and over or (unit is None and not over):
            break
        power = {"s": 2, "c": 3}.get((piece["shape"] or "")[:1], 1)
        power *= int(piece["power"] or piece["digit"] or 1) * (-1 if over else 1)
        rest = text[piece.end() :].strip(" .")
        if piece["name"] == "in" and rest[:1].isalnum():  # the preposition
            break
        if powers and not over and power > 0:  # "m s" is more often a mistake than a product
            break
        if unit is None:
            unit = Unit(piece["name"].lower().rstrip("s"), Fraction(1))
        base, _, cube = unit.dimension.partition("^")
        if " " in base:  # mph
            powers |= {"length": 1, "time": -1}
        else:
            powers[base] = powers.get(base, 0) + power * int(
                cube if " " not in cube and cube else 1
            )
        factor *= unit.factor**power
        end = piece.end()
    if not end:
        return None, 0
    dimension = " ".join(n if p == 1 else f"{n}^{p}" for n, p in sorted(powers.items()) if p)
    return Unit(dimension, factor), len(text[:end].rstrip())
