"""Rows of local files, each with its place in the file."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.kinds import check_kind, opened
from jaxft.data.values import arrow_row, check_values, parse_json

# Columns that are a list of objects and are a complete row by themselves.
FORMS_OF_ONE = {"messages", "conversations"}
# Names under which a file of one object holds its rows.
_WRAPPERS = {"data", "rows", "examples", "instances", "records", "train", "samples"}

_LINE_END = re.compile(r"\r\n|\r|\n")

Row = tuple[str, Any]  # (where, the row or its DataError)


def rows_of(path: pathlib.Path) -> Iterator[Row]:
    """Yields ("name, line 4", row) for each row of a file of one of `kinds.SUFFIXES`.

    Raises:
        DataError: if the file is of another kind or damaged; for a damaged line of JSON Lines, the row is
            a DataError.
    """
    kind = check_kind(path)
    if kind in (".csv", ".tsv"):
        return _csv(path, "\t" if kind == ".tsv" else ",")
    if kind in (".parquet", ".arrow"):
        return _arrow(path, kind)
    with opened(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind == ".json":
        _refuse_one_object(path)
    return _json_array(path) if head.startswith(b"[") else _json_lines(path)


def _refuse_one_object(path):
    """Raises DataError for a single object, over several lines or around a list of rows."""
    with opened(path) as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
        if not first.startswith(b"{") or (first != b"{" and file.readline().strip()):
            return
        file.seek(0)
        raw = file.read()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return  # The reader reports the error by line.
    is_rows = lambda value: isinstance(value, list) and value and isinstance(value[0], dict)
    holds = [name for name, value in found.items() if is_rows(value)]
    wraps = len(found) == 1 and not FORMS_OF_ONE & {*holds} or _WRAPPERS & {*holds}
    if first == b"{" or (holds and wraps):
        holds = sorted(holds, key=lambda name: name not in _WRAPPERS)
        inside = f" (jq .{holds[0]} {path.name} > rows.json)" if holds else ""
        raise DataError(
            f"{path.name}: one JSON object with {sorted(found)[:5]}; expected a list of rows{inside}, or "
            "one row a line."
        )


class JsonLines:
    """A JSON Lines file with random access: len(), [i] -> row, line(i); empty lines do not count.

    Holds 8 bytes per line and no rows. Any number of threads or processes may read it, so it can be
    used directly as a Grain source.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        self._starts, self._lines = _index(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def line(self, i: int) -> int:
        """Returns the 1-based line of row i."""
        return int(self._lines[i]) + 1

    def __getitem__(self, i: int) -> Any:
        line = int(self._lines[i])
        start, end = self._starts[line : line + 2].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            row = parse_line(file.read(end - start), line == 0)
        if isinstance(row, DataError):
            raise DataError(f"{self.path.name}, line {line + 1}: {row}", row.code)
        return row


def parse_line(raw: bytes, first: bool) -> Any:
    """Parses a line of JSON Lines to its object, or returns a DataError."""
    try:
        # Some editors put a byte-order mark before the first line.
        row = parse_json(raw.decode("utf-8-sig" if first else "utf-8"))
        if isinstance(row, dict):
            check_values(row)
    except UnicodeDecodeError as error:
        return _not_utf8(raw, error)
    except DataError as error:
        return error
    return _object(row)


def _json_lines(path):
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield f"{path.name}, line {number}", parse_line(raw, number == 1)


def _json_array(path):
    with opened(path) as file:
        raw = file.read()
    try:
        rows = parse_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: {_not_utf8(raw, error)}") from None
    except DataError as error:
        raise DataError(
            f"{path.name}: {error} A file of one object a line must not begin with '['."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a list of objects, got {type(rows).__name__}.")
    for i, row in enumerate(rows):
        yield f"{path.name}, row {i}", _object(row)


def _object(row):
    if isinstance(row, dict):
        return row
    return DataError(f"expected a JSON object, got {type(row).__name__}.", "schema")


def _not_utf8(raw, error):
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[:4].count(0) > 1
    kind = "UTF-16 or UTF-32" if wide else f"not UTF-8 (byte {error.start})"
    return DataError(f"{kind}; convert the file to UTF-8.", "encoding")


def _csv(path, delimiter):
    """Yields rows in which every cell is text; `where` is the line where the row begins."""
    csv.field_size_limit(1 << 30)  # The default of 128 KiB is shorter than a long document.
    reader, before = None, 1
    try:
        # Bytes that are not UTF-8 are reported with their cell when the row becomes a record.
        with opened(path) as raw:
            file = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, strict=True, **_dialect(header, delimiter))
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            _check_header(path, reader.fieldnames)
            for row in reader:
                before = reader.line_num
                begins = before - _line_ends(row)  # Empty lines before the row are skipped.
                columns = len(reader.fieldnames)
                if None in row or None in row.values():
                    cells = [v for k, v in row.items() if k is not None and v is not None]
                    count = len(cells) + len(row.get(None) or ())
                    row = DataError(f"{count} cells for {columns} columns.", "schema")
                yield f"{path.name}, line {begins}", row
    except csv.Error as error:
        raise DataError(f"{path.name}, line {before + 1}: not valid CSV ({error}).") from None


def _line_ends(row):
    """Counts the ends of lines inside the cells of a row."""
    cells = [*row.values(), *(row.get(None) or ())]
    return sum(len(_LINE_END.findall(cell)) for cell in cells if isinstance(cell, str))


def _dialect(header, delimiter):
    """Determines the delimiter of a file's cells from its first line.

    Spreadsheets in many countries write semicolons, because their numbers contain commas. If a
    header has a blank after each delimiter, blanks after delimiters are not part of the cells.
    """
    others = [mark for mark in ",;\t|" if mark in header]
    if delimiter not in header and len(others) == 1:
        delimiter = others[0]
    parts = header.rstrip("\r\n").split(delimiter)[1:]
    padded = delimiter != "\t" and bool(parts) and all(part.startswith(" ") for part in parts)
    return {"delimiter": delimiter, "skipinitialspace": padded}


def _check_header(path, names):
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path.name}: the columns {twice} occur twice in the first line.")


def _arrow(path, suffix):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ModuleNotFoundError(f"{suffix} files need pip install 'jaxft[text]'") from None
    try:
        table = pq.read_table(path) if suffix == ".parquet" else _arrow_table(path)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path.name}: not a readable {suffix} file ({reason}).") from None
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in _arrow_rows(batch))
    for i, row in enumerate(rows):
        yield f"{path.name}, row {i}", row


def _arrow_rows(batch):
    """Returns the rows of a record batch, with a DataError for each unreadable row."""
    try:
        rows = batch.to_pylist()
    except ValueError as error:  # Text that is not UTF-8, or two fields of one name.
        if len(batch) == 1:
            code = "encoding" if isinstance(error, UnicodeDecodeError) else "schema"
            return [DataError(f"not readable ({error}).", code)]
        return [row for i in range(len(batch)) for row in _arrow_rows(batch.slice(i, 1))]
    return [_arrow_row(row, batch.schema) for row in rows]


def _arrow_row(row, schema):
    try:
        return arrow_row(row, schema, decoded=False)
    except DataError as error:
        return error


def _arrow_table(path):
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:  # `datasets` writes the streaming format with the same suffix.
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _index(path, chunk=1 << 24):
    """Returns (byte where each line starts, and the end; numbers of the lines that are not empty)."""
    starts, size = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(newlines.astype(np.int64) + size + 1)
            size += len(block)
        starts = np.concatenate(starts)
        starts = starts if starts[-1] == size else np.append(starts, size)
        short = np.flatnonzero(np.diff(starts) <= 2)  # Too short for an object: "\n", "\r\n", "{}".
        blank = [i for i in short.tolist() if not _bytes(file, starts, i).strip()]
    return starts, np.delete(np.arange(len(starts) - 1), blank)


def _bytes(file, starts, i):
    file.seek(int(starts[i]))
    return file.read(int(starts[i + 1] - starts[i]))
