"""Rows of local files, each with the place it has in its file."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxft.data.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")

Row = tuple[str, Any]  # (where, the row, or the DataError it is)


def rows_of(path: pathlib.Path) -> Iterator[Row]:
    """("name, line 4", row) of each row of a file of one of SUFFIXES.

    Raises:
        DataError: if the file is damaged; damaged lines of JSON Lines are errors in their place.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file {suffix!r}; expected one of {', '.join(SUFFIXES)}."
        )
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix in (".parquet", ".arrow"):
        return _arrow(path, suffix)
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _json_array(path) if head.startswith(b"[") else _json_lines(path)


class JsonLines:
    """A JSON Lines file by random access: len(), [i] -> row, line(i); empty lines do not count.

    Holds 8 bytes a line and nothing of the rows, and any number of threads or processes may read,
    so that it serves as a source of Grain as it is.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        self._starts, self._lines = _index(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def line(self, i: int) -> int:
        """The 1-based line of row i."""
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
    """The object of a line of JSON Lines, or the DataError that it is."""
    try:
        # Some editors put a byte-order mark before the first line.
        row = json.loads(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start}); convert the file.", "encoding")
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON ({error.msg} at column {error.colno}).", "json")
    if not isinstance(row, dict):
        return DataError(f"expected a JSON object, got {type(row).__name__}.", "schema")
    return row


def _json_lines(path):
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield f"{path.name}, line {number}", parse_line(raw, number == 1)


def _json_array(path):
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 (byte {error.start}); convert the file.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}, line {error.lineno}: not valid JSON ({error.msg}); a file of one object a "
            "line must not begin with '['."
        ) from None
    for i, row in enumerate(rows):
        fine = isinstance(row, dict)
        error = DataError(f"expected a JSON object, got {type(row).__name__}.", "schema")
        yield f"{path.name}, row {i}", row if fine else error


def _csv(path, delimiter):
    """Every cell is text; `where` is the line where the row begins."""
    csv.field_size_limit(1 << 30)  # The default of 128 KiB is shorter than a long document.
    reader, before = None, 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                begins, before = before + 1, reader.line_num
                columns = len(reader.fieldnames)
                if None in row or None in row.values():
                    cells = [v for k, v in row.items() if k is not None and v is not None]
                    count = len(cells) + len(row.get(None) or ())
                    row = DataError(f"{count} cells for {columns} columns.", "schema")
                yield f"{path.name}, line {begins}", row
    except csv.Error as error:
        raise DataError(f"{path.name}, line {before + 1}: not valid CSV ({error}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 (byte {error.start}); convert the file.") from None


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
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    for i, row in enumerate(rows):
        yield f"{path.name}, row {i}", row


def _arrow_table(path):
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:  # `datasets` writes the streaming format under the same suffix.
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _index(path, chunk=1 << 24):
    """(byte where each line starts, and the end; numbers of the lines that are not empty)."""
    starts, size = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(newlines.astype(np.int64) + size + 1)
            size += len(block)
        starts = np.concatenate(starts)
        starts = starts if starts[-1] == size else np.append(starts, size)
        short = np.flatnonzero(np.diff(starts) <= 2)  # No object is: "\n", "\r\n", "{}".
        blank = [i for i in short.tolist() if not _bytes(file, starts, i).strip()]
    return starts, np.delete(np.arange(len(starts) - 1), blank)


def _bytes(file, starts, i):
    file.seek(int(starts[i]))
    return file.read(int(starts[i + 1] - starts[i]))
