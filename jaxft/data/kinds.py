"""Kinds of data files, by name and first bytes; compressed files are read directly."""

from __future__ import annotations

import bz2
import collections
import contextlib
import gzip
import itertools
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxft.data.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_TABLES = (".parquet", ".arrow")  # binary, with internal compression
_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)

# What to do with files of other kinds.
_REMEDIES = {
    ".txt": "plain text does not say where a record ends; write one object a line, "
    '{"text": "..."}, into a .jsonl file',
    ".md": 'write the text into a .jsonl file, one object a line: {"text": "..."}',
    ".zst": "decompress it (zstd -d FILE), or compress it with gzip",
    ".zip": "unpack it (unzip FILE) and name the file inside",
    ".tar": "unpack it (tar xf FILE) and name the file inside",
    ".tgz": "unpack it (tar xzf FILE) and name the file inside",
    ".7z": "unpack it and name the file inside",
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".xls": "save the sheet as CSV (UTF-8)",
    ".ods": "save the sheet as CSV (UTF-8)",
    ".pkl": "a pickle can run code and is never loaded; save the rows as .jsonl",
    ".pickle": "a pickle can run code and is never loaded; save the rows as .jsonl",
    ".yaml": "write one JSON object a line into a .jsonl file",
    ".yml": "write one JSON object a line into a .jsonl file",
    ".feather": "a Feather file of version 2 is an Arrow file; rename it to .arrow",
}
# First bytes of files whose content does not match their name.
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the data; fetch the data by `git lfs pull`",
    b"<!doctype html": "a web page instead of the data; download the raw file",
    b"<html": "a web page instead of the data; download the raw file",
    b"par1": "a Parquet file; rename it to .parquet",
    b"arrow1": "an Arrow file; rename it to .arrow",
    b"\x1f\x8b": "compressed with gzip; rename it so that it ends in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it (zstd -d)",
    b"pk\x03\x04": "a zip archive (or a spreadsheet); unpack it, or save the sheet as CSV (UTF-8)",
}
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")


def kind_of(path: pathlib.Path) -> str | None:
    """Returns the suffix of SUFFIXES of a name, ignoring .gz, .bz2 or .xz after text; None for others."""
    last = path.suffix.lower()
    if last in _OPEN:
        inner = pathlib.Path(path.stem).suffix.lower()
        return inner if inner in SUFFIXES and inner not in _TABLES else None
    return last if last in SUFFIXES else None


def check_kind(path: pathlib.Path) -> str:
    """Returns the kind of a file, if it can be read.

    Raises:
        DataError: for an unknown kind, an empty file, text in UTF-16, or content that contradicts the name.
    """
    kind = kind_of(path)
    if kind is None:
        known = f"expected one of {', '.join(SUFFIXES)}, of which text may be compressed (.gz, .bz2, .xz)"
        suffix = path.suffix.lower()
        said = f"unknown kind of file {suffix!r}" if suffix else "the name has no suffix"
        raise DataError(f"{path}: {said}; {_REMEDIES.get(suffix, known)}.")
    with opened(path) as file:
        head = file.read(64)
    if not head:
        raise DataError(f"{path.name}: no records; the file is empty.")
    if kind not in _TABLES:
        if head.startswith(_WIDE) or (len(head) > 3 and head[:4].count(0) > 1):
            raise DataError(
                f"{path.name}: UTF-16 or UTF-32; convert the file to UTF-8, as in iconv -f UTF-16 -t UTF-8 "
                f"{path.name} > utf8-{path.name}.",
                "encoding",
            )
        head = head.removeprefix(b"\xef\xbb\xbf")
    for begins, what in _BEGINNINGS.items():
        own = (kind, begins) in ((".parquet", b"par1"), (".arrow", b"arrow1"))
        if head.lower().lstrip().startswith(begins) and not own:
            raise DataError(f"{path.name}: {what}.")
    return kind


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, decompressed according to its name.

    Raises:
        DataError: if a compressed file is damaged.
    """
    opener = _OPEN.get(path.suffix.lower())
    if opener is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with opener(path, "rb") as file:
            yield file
    except _DAMAGED as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(
            f"{path.name}: not a whole {path.suffix} file ({error}); compress or download it again."
        ) from None


def files_in(folder: pathlib.Path) -> str:
    """Lists a folder's kinds of files and a pattern for the commonest, as a clause for an error."""
    some = sorted(itertools.islice(folder.rglob("*"), 10_000))
    files = [p for p in some if p.is_file() and not p.name.startswith(".")]
    groups = collections.Counter((p.parent, _ending(p)) for p in files if kind_of(p))
    if not groups:
        return "it holds no file of a known kind"
    counts = collections.Counter(_ending(p) if kind_of(p) else "other" for p in files)
    held = ", ".join(f"{n} {name}" for name, n in counts.most_common(4))
    (parent, ending), _ = groups.most_common(1)[0]
    return f"it holds {held} files; name one of them, or a pattern such as '{parent}/*{ending}'"


def _ending(path):
    kind = kind_of(path)
    return kind if kind is None or kind == path.suffix.lower() else kind + path.suffix.lower()
