"""Tables of choices: which other flags their entries read, and which they refuse.

A table is a dict of name -> entry, a NamedTuple with `make` and the fields that this module reads:

    reads    names of flags that this entry reads and that not all entries of the table read
    refuses  {name of a flag: why the entry refuses every value but the default}

For example, the flags of `--algorithm` are the union of the flags that its entries read. A flag counts as
given if its value is not the default. A given flag without effect is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.cli import flags


def check(config: Any, choice: str, table: Mapping[str, Any]) -> None:
    """Raises ValueError for a given flag that the chosen entry refuses or does not read.

    Args:
        choice: the flag that chooses, such as "algorithm".
        table: name -> entry with `reads` and `refuses`.
    """
    name = flags.flat(config)[choice]
    for flag, value in given(config).items():
        if flag in table[name].refuses:
            others = [other for other, entry in table.items() if flag not in entry.refuses]
            raise ValueError(
                f"{shown(flag, value)} is refused by {option(choice)} {name}, which "
                f"{table[name].refuses[flag]}; use {one_of(others)}."
            )
        readers = [other for other, entry in table.items() if flag in entry.reads]
        if readers and name not in readers:
            raise ValueError(
                f"{shown(flag, value)} has no effect with {option(choice)} {name}; use {one_of(readers)}."
            )


def check_companions(config: Any, companions: Mapping[str, str]) -> None:
    """Raises ValueError for a flag that is given without the flag that it depends on.

    Args:
        companions: {flag: the flag without which it has no effect}.
    """
    found = given(config)
    for flag, other in companions.items():
        if flag in found and other not in found:
            raise ValueError(
                f"{shown(flag, found[flag])} has no effect without {option(other)}; give both or neither."
            )


def check_excluded(config: Any, names: Iterable[str], other: str) -> None:
    """Raises ValueError for a given flag of `names`, which have no effect with `other`, "--preset full"."""
    found = given(config)
    for name in filter(found.__contains__, names):
        raise ValueError(
            f"{shown(name, found[name])} has no effect with {other}; give one of them."
        )


def given(config: Any) -> dict[str, Any]:
    """{name: value} of the flags whose values differ from the script's defaults."""
    default = flags.flat(type(config)())
    return {name: x for name, x in flags.flat(config).items() if x != default[name]}


def shown(flag: str, value: Any) -> str:
    """Formats a flag as typed: "--push-every 2"."""
    if value is True:
        return option(flag)
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([option(flag), *map(str, values)])


def option(flag: str) -> str:
    """Returns the name of a flag on the command line."""
    return "--" + flag.replace("_", "-")


def one_of(names: Iterable[str]) -> str:
    """Joins names as "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
