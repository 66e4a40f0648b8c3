"""Errors of writing that name the path and a remedy."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class OutputError(OSError):
    """A file or directory that cannot be written, has no room, or holds another run.

    state, history: those of the training run that it ended, as `fit` would have returned them.
    """

    state: Any = None
    history: Any = None


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an error of the file system inside the block into an OutputError that names `path`.

    Without it, the error of a full disk is "[Errno 28] No space left on device".
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        # Rust libraries such as safetensors have their own error types, with this text.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise OutputError(
            f"{path} could not be written: {reason(error)}; {free(path)}Make room or choose another place."
        ) from error


def writable_directory(directory: str | Path, size: int = 0) -> Path:
    """Creates the directory, probes it by writing a file, and returns it.

    Raises:
        OutputError: if it cannot be written or has less than `size` bytes free.
    """
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"probe" * 1000)
    except OSError as error:
        raise OutputError(
            f"cannot write to {directory}: {reason(error)}; make room or choose another."
        ) from error
    check_room(directory, size)
    return directory


def check_room(directory: Path, size: int) -> None:
    """Raises OutputError if the directory has less than `size` bytes free."""
    room = shutil.disk_usage(directory).free
    if room < size:
        raise OutputError(
            f"{directory} has {size_text(room)} free, but one checkpoint takes {size_text(size)}; "
            "make room or choose another directory."
        )


def reason(error: Exception) -> str:
    """The first line of an error."""
    said = getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:300]
    return said or type(error).__name__


def free(path: str | os.PathLike) -> str:
    """The free space, as a clause; empty if it is unknown."""
    path = Path(path).absolute()
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    try:
        return f"{size_text(shutil.disk_usage(there).free)} are free there. "
    except (OSError, TypeError):
        return ""


def size_text(size: float) -> str:
    """A number of bytes with three digits, in the largest decimal unit not above it: 2 MB = 2e6 bytes."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit, scale = next(((u, s) for u, s in units.items() if size >= 0.9995 * s), ("bytes", 1))
    number = size / scale
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
