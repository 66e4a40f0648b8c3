"""JSON files of models and adapters."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jaxft.models.errors import CheckpointError


def read_json(file: pathlib.Path, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        error: if there is none; the message names the file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise error(
            f"{file}: damaged, not valid JSON ({reason}); copy or download it again."
        ) from None
    if not isinstance(found, dict):
        raise error(f"{file}: expected a JSON object, got {str(found)[:40]!r}.")
    return found
