"""GGUF models that are split into files: NAME-00001-of-00003.gguf, as llama.cpp names them."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from jaxft.models import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts_of(file: pathlib.Path) -> list[pathlib.Path]:
    """All parts of the model that `file` belongs to, in order; only the file if it is not a part.

    Raises:
        CheckpointError: with the names of the missing parts.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    names = [
        f"{match['stem']}-{i + 1:05d}-of-{match['count']}.gguf" for i in range(int(match["count"]))
    ]
    parts = [file.with_name(name) for name in names]
    missing = [part.name for part in parts if not part.exists()]
    if missing or file not in parts:
        raise CheckpointError(
            f"{file}: a part of a split model, of which {', '.join(missing) or 'this is none'} "
            f"{'are' if len(missing) > 1 else 'is'} missing in {file.parent}; put all parts there."
        )
    return parts


def one_model(files: Sequence[pathlib.Path], where: pathlib.Path) -> pathlib.Path:
    """The one model among the .gguf files of a directory: the only file, or the first part.

    Raises:
        CheckpointError: if there are several.
    """
    matches = {file: _PART.fullmatch(file.name) for file in files}
    models = {m and (m["stem"], m["count"]) or file.name: file for file, m in matches.items()}
    if len(models) > 1:
        names = ", ".join(sorted({file.name for file in models.values()}))
        raise CheckpointError(
            f"{where}: holds {len(models)} .gguf models ({names}); name the one to load."
        )
    return min(files)
