"""Values of rows: strict JSON, valid Unicode text, and removal of nulls that tables add."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxft.data.errors import DataError

MAX_DEPTH = 64  # levels; deeper values cause a RecursionError in JSON, Jinja or copy
_MAX_DIGITS = 400  # maximum digits of an integer; Python itself refuses to read 4300


class _Damaged:
    """Placeholder in a parsed row for an unusable value, which `check_values` reports."""

    def __init__(self, reason: str):
        self.reason = reason


def parse_json(text: str) -> Any:
    """Parses JSON text; `check_values` reports invalid values inside it.

    Invalid values are NaN, Infinity, numbers that overflow, integers of more than 400 digits and duplicate
    keys: Python's own parser accepts them, but other parsers do not.

    Raises:
        DataError: if the text as a whole is not JSON.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=lambda name: _Damaged(f"{name} is not valid JSON; write null"),
        )
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}).", "json"
        ) from None
    except RecursionError:
        raise DataError(f"nested more than {MAX_DEPTH} levels deep.", "json") from None


def strict_json(text: str, name: str) -> Any:
    """Parses JSON text inside a column; DataError names the column."""
    try:
        value = parse_json(text)
        check_values(value)
    except DataError as error:
        raise DataError(f"{name}: {error}", "schema") from None
    return value


def from_cell(value: Any, *, number: bool = False) -> Any:
    """Parses a number, or a JSON list, from a table's cell, which is text; returns other values unchanged.

    An empty cell is None.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return float(value) if number else json.loads(value) if value.lstrip()[0] == "[" else value
    except (ValueError, RecursionError):
        return value


def check_values(value: Any, *, finite: bool = False) -> None:
    """Raises DataError for text that is not Unicode, damaged JSON, keys that are not text, and deep nesting.

    Args:
        value: a row, or a value of a row. Values of types other than JSON's are accepted.
        finite: refuses NaN and infinities in Python's numbers, which no template can write as JSON.
    """
    left = [(value, 0, "")]
    while left:
        value, depth, name = left.pop()
        if depth > MAX_DEPTH:
            raise DataError(f"{name!r} is nested more than {MAX_DEPTH} levels deep.", "json")
        if isinstance(value, _Damaged):
            raise DataError(f"{name!r}: {value.reason}.", "json")
        if isinstance(value, str):
            _check_text(value, name)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise DataError(f"a key must be text, got {key!r:.40}.", "schema")
                _check_text(key, "a key")
                left.append((item, depth + 1, name or key))
        elif isinstance(value, (list, tuple)):
            left += [(item, depth + 1, name) for item in value]
        elif finite and isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{name!r} holds {value}, which is not a JSON number.", "schema")


def without_filled(value: Any, arrow_type: Any = None, *, decoded: bool = True) -> Any:
    """Removes null keys that Arrow added, because a struct has the keys of all rows.

    A null that the row's author wrote inside a struct cannot be distinguished, and is removed too. Columns of
    Arrow's JSON type keep their nulls.

    Args:
        arrow_type: type of the column; None: every dict counts as a struct.
        decoded: values of the JSON type are parsed, as in `datasets`, rather than text.
    """
    import pyarrow as pa

    again = functools.partial(without_filled, decoded=decoded)
    known = arrow_type is not None
    if known and isinstance(arrow_type, pa.BaseExtensionType):
        is_text = not decoded and isinstance(value, str)
        return parse_json(value) if is_text and _is_json(arrow_type) else value
    if known and pa.types.is_map(arrow_type) and isinstance(value, list):
        return {key: again(item, arrow_type.item_type) for key, item in value}
    if isinstance(value, Mapping):
        structs = known and pa.types.is_struct(arrow_type)
        types = {field.name: field.type for field in arrow_type} if structs else {}
        return {k: again(item, types.get(k)) for k, item in value.items() if item is not None}
    if isinstance(value, list):
        inner = arrow_type.value_type if known and hasattr(arrow_type, "value_type") else None
        return [again(item, inner) for item in value]
    return value


def arrow_row(
    row: Mapping[str, Any], schema: Any = None, *, decoded: bool = True
) -> dict[str, Any]:
    """Applies `without_filled` to every column of the row; columns that are null themselves are kept."""
    types = {} if schema is None else {field.name: field.type for field in schema}
    clean = lambda name, value: without_filled(value, types.get(name), decoded=decoded)
    return {name: clean(name, value) for name, value in row.items()}


def _is_json(arrow_type):
    return arrow_type.extension_name == "arrow.json"


def _check_text(text, name):
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        if "\udc80" <= found <= "\udcff":  # from reading with `surrogateescape`
            why = f"byte 0x{ord(found) - 0xDC00:02x} is not UTF-8; convert the file"
        else:
            why = f"an unpaired surrogate \\u{ord(found):04x}; the text was cut inside a character"
        raise DataError(f"{name!r}: {why}.", "encoding") from None


def _object(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        made[twice] = _Damaged(f"the key {twice!r} occurs twice in one object")
    return made


def _integer(text):
    return int(text) if len(text) <= _MAX_DIGITS else _Damaged(f"an integer of {len(text)} digits")


def _number(text):
    value = float(text)
    return value if math.isfinite(value) else _Damaged(f"the number {text:.40} is too large")
