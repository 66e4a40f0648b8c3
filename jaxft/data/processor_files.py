"""The settings of a model's processor of images or clips, in the files that transformers writes."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxft.data.errors import DataError
from jaxft.models.json_files import read_json


def processor_settings(path: pathlib.Path, part: str) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Returns (their file, the settings) of a directory; {} if it has none.

    They are preprocessor_config.json, or, written by transformers 5, a part of processor_config.json.

    Args:
        part: "image_processor" or "feature_extractor".

    Raises:
        DataError: if they are not an object.
    """
    first = path / "preprocessor_config.json"
    for file in (first, path / "processor_config.json"):
        found = read_json(file) if file.exists() else {}
        found = found if file == first or not found else found.get(part)
        if found and not isinstance(found, Mapping):
            raise DataError(f"{file}: expected an object of settings, got {found!r:.60}.")
        if found:
            return file, found
    return first, {}


def number(file: pathlib.Path, name: str, value: Any) -> float:
    """Returns a finite number of a file; raises DataError for anything else."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine:
        raise DataError(f"{file}: {name} is {value!r:.60}, expected a number; correct the file.")
    return float(value)


def sizes(file: pathlib.Path, settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the sides of a size, {} if it is absent or null, `height` and `width` for a whole number."""
    given = settings.get(name)
    if type(given) is int:
        return {"height": given, "width": given}
    if given is not None and not isinstance(given, Mapping):
        raise DataError(
            f"{file}: {name} is {given!r:.60}, expected sides in pixels; correct the file."
        )
    return given or {}


def channels(file: pathlib.Path, name: str, value: Any) -> tuple[float, ...]:
    """Returns the three numbers of the channels; one number stands for all of them.

    Raises:
        DataError: for anything else, or a standard deviation of zero.
    """
    given = list(value) if isinstance(value, (list, tuple)) else 3 * [value]
    found = tuple(number(file, name, one) for one in given)
    if len(found) != 3 or (name.endswith("std") and 0.0 in found):
        raise DataError(
            f"{file}: {name} is {value!r:.60}, expected a number for each of 3 channels, no deviation of 0; "
            "correct the file."
        )
    return found
