"""Sources of records: files, data sets, generated tasks, lists."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import json
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.columns import no_column
from jaxft.data.errors import BadRecords, DataError
from jaxft.data.files import rows_of
from jaxft.data.kinds import SUFFIXES, files_in, kind_of
from jaxft.data.media import media_in, resolved
from jaxft.data.records import OPTIONAL, Record, normalise
from jaxft.data.remote import retried
from jaxft.data.values import arrow_row

Spec = str | pathlib.Path | Sequence[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


def load(
    spec: Spec,
    *,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    bad: BadRecords | None = None,
    form: Callable[..., Record] = normalise,
) -> list[Record]:
    """Loads normalised records in order, each with `id`, `_source` and `_where` (file and line).

    Columns of a row that `form` does not read are kept. A null `id` becomes the row's number.

    Args:
        spec: a .json, .jsonl, .parquet, .arrow or .csv file; a folder of `datasets.save_to_disk`;
            "rg:TASK?size=1000&seed=0&OPTION=VALUE" for a reasoning-gym task (its answer is the
            completion, its entry stays under `metadata`); "tfds:NAME?split=train"; a Hugging Face
            hub id, "OWNER/NAME?split=train", where "&streaming=true&limit=10000" fetches only the first
            rows; a list of dicts; or a function that returns one.
        fields: our column name -> the source's; see `normalise`.
        limit: maximum number of records; None: all.
        bad: policy for records that cannot be used; default: raise at the first.
        form: function from a row to a record: `normalise`, for supervised fine-tuning; `normalise_pair`,
            `normalise_unpaired` or `normalise_ranked`, for preferences; or your own (row, fields) -> record.

    Relative paths of images and clips count from the folder of the file that holds their row.

    Files may also be given by a pattern, "part-*.jsonl", and a saved folder of several splits as
    "FOLDER?split=test".

    Raises:
        DataError: if the source is missing, empty or unreadable, or by the policy of `bad`.
    """
    bad = BadRecords() if bad is None else bad
    name, parts = _rows(spec)
    rows = ((folder, where, raw) for folder, part in parts for where, raw in part)
    records, seen, absent = [], 0, {b: {} for a, b in (fields or {}).items() if a in OPTIONAL and b}
    for folder, where, raw in rows:
        if limit is not None and seen >= limit:
            break
        seen += 1
        try:
            if isinstance(raw, Exception):
                raise raw
            if not isinstance(raw, Mapping):
                raise DataError(f"expected an object, got {type(raw).__name__}.", "schema")
            absent = {column: raw for column in absent if column not in raw}
            record = form(raw, fields)
            record = resolved(record, folder) if folder and media_in(record) else record
        except DataError as error:
            bad.add(where, error.code or "schema", str(error))
            continue
        if record.get("id") is None:
            record["id"] = f"{name}:{seen - 1}"
        records.append(record | {"_source": name, "_where": where})
    for column, row in absent.items() if seen else ():
        raise DataError(f"{name}: {no_column(column, row)}")
    bad.check(seen)
    if not records and seen:
        raise DataError(f"{name}: none of {seen} rows is a record ({bad.summary()}).")
    if not records:
        raise DataError(f"{name}: no records; is it the right file?")
    return records


def split(records: Sequence[Record], validation: float) -> tuple[list[Record], list[Record]]:
    """Returns (training, validation) records; a record's side depends only on its id."""
    if not 0 <= validation < 1:
        raise DataError(f"split: validation must lie in [0, 1), got {validation}.")
    if validation and len(records) > 1 and len({str(record["id"]) for record in records}) == 1:
        raise DataError(
            f"all {len(records)} records have the id {records[0]['id']!r:.40}, so none can be held out; "
            "leave the column out with --fields id '', in Python fields={'id': ''}."
        )
    held_out = [_unit_hash(str(record["id"])) < validation for record in records]
    pick = lambda side: [r for r, h in zip(records, held_out, strict=True) if h is side]
    return pick(False), pick(True)


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def local_files(spec: str) -> list[pathlib.Path]:
    """Returns the local files that `load` reads for a source, sorted; [] for other kinds of sources."""
    path = pathlib.Path(spec).expanduser()
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else pathlib.Path(parse_options("disk:" + spec)[0]).expanduser()
    if folder.is_dir() and not spec.startswith(("rg:", "tfds:")):
        return sorted(p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in map(pathlib.Path, glob.glob(str(path))) if p.is_file())


# Rows, each with its place, and the folder of their file; "": they have none.
_Part = tuple[str, Iterable[tuple[str, Any]]]


def _rows(spec: Spec) -> tuple[str, Iterable[_Part]]:
    """Returns the name of a source, and its rows by folder."""
    if callable(spec):
        rows = spec()
        if not isinstance(rows, Iterable):
            raise DataError(f"the function returned {rows!r:.40}; expected rows.")
        return "function", [("", _numbered("function", rows))]
    if not isinstance(spec, (str, pathlib.Path)):
        return "list", [("", _numbered("list", spec))]
    text = str(spec)
    if text.startswith("rg:"):
        return text, [("", _reasoning_gym(text))]
    if text.startswith("tfds:"):
        return text, [("", _numbered(text, _tfds(text)))]
    return _local_or_hub(text)


def _local_or_hub(text: str) -> tuple[str, Iterable[_Part]]:
    path = pathlib.Path(text).expanduser()
    if path.is_file():
        return path.name, [(str(path.parent), rows_of(path))]
    name, options = parse_options("disk:" + text)
    folder = path if path.is_dir() else pathlib.Path(name).expanduser()
    if folder.is_dir():
        rows = _saved(folder, {} if path.is_dir() else options)
        return folder.name, [(str(folder), _numbered(folder.name, rows))]
    if glob.has_magic(text) and (kind_of(path) or not options):
        return path.name, _pattern(text)
    if not kind_of(path) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return text, [("", _numbered(text, _hub(text)))]
    if "://" in text:
        raise DataError(
            f"{text}: an address, which is not read; download the file and name it, or give the hub id "
            "OWNER/NAME?split=train."
        )
    if odd := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+)|:(.+))", name):
        if not kind_of(path) and not path.parent.is_dir():
            option = f"name={odd[2]}" if odd[2] else f"split={odd[3]}"
            raise DataError(f"{text}: no such file; from the hub it is {odd[1]}?{option}.")
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=1)
    if close:
        raise DataError(f"{text}: no such file; did you mean {close[0]!r}?")
    if kind_of(path):
        raise DataError(f"{text}: no such file.")
    raise DataError(
        f"{text}: no such file, and not a known kind of source; give a file ({', '.join(SUFFIXES)}), a saved "
        "data set, rg:TASK, tfds:NAME or a hub id OWNER/NAME."
    )


def _pattern(text):
    """Returns the rows of all matching files by name; checks every file before reading any."""
    found = local_files(text)
    if not found:
        raise DataError(f"{text}: no file matches this pattern.")
    # Programs that write one file per worker may leave empty files.
    return [(str(path.parent), rows_of(path)) for path in found if path.stat().st_size]


def _saved(folder, options):
    if not any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{folder}: a folder, but not one that `datasets` saved; {files_in(folder)}."
        )
    if others := sorted(options.keys() - {"split"}):
        raise DataError(
            f"{folder}: no option {others[0]!r}; a saved data set has only ?split=NAME (--limit and --fields "
            "are the script's)."
        )
    found = _datasets().load_from_disk(str(folder))
    if not isinstance(found, dict):
        own = str(found.split) if found.split is not None else None
        if options.get("split", own) != own:
            raise DataError(
                f"{folder}: ?split={options['split']}, but it was saved as a single set"
                f"{f', the split {own!r}' if own else ''}; leave ?split= out, or name another folder."
            )
        return found
    name = options.get("split", "train")
    if name not in found:
        raise DataError(f"{folder}: no split {name!r}; add ?split= with one of {list(found)}.")
    return found[name]


def _numbered(name: str, rows: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    return ((f"{name}, row {i}", row) for i, row in enumerate(_clean(rows)))


def _clean(rows: Iterable[Any]) -> Iterable[Any]:
    """Yields the rows; from rows of `datasets`, removes keys that Arrow's tables filled with null."""
    if not hasattr(rows, "features"):
        return rows
    rows = _with_files(rows)
    schema = getattr(rows.features, "arrow_schema", None)  # A stream may lack it.
    return (arrow_row(row, schema) for row in rows)


def _with_files(rows: Any) -> Any:
    """The rows of `datasets` with the files of images and clips, which jaxft's processors read.

    `datasets` decodes clips with another package, and holds decoded images in memory.
    """
    streams = not hasattr(
        rows, "data"
    )  # their images may be in archives that only `datasets` opens
    for name, feature in (rows.features or {}).items():
        kind = type(feature).__name__
        if kind == "Audio" or (kind == "Image" and not streams):
            rows = rows.cast_column(name, dataclasses.replace(feature, decode=False))
    return rows


def parse_options(spec: str) -> tuple[str, dict[str, Any]]:
    """Parses "rg:chain_sum?size=100" to ("chain_sum", {"size": 100})."""
    name, _, query = spec.partition(":")[2].partition("?")
    options = {}
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options


def reasoning_gym_task(spec: str) -> Any:
    """Makes the reasoning-gym data set of "rg:TASK?size=...&seed=...": entries and `score_answer`."""
    try:
        import reasoning_gym
    except ImportError:
        raise ModuleNotFoundError("rg: tasks need pip install 'jaxft[text]'") from None
    from reasoning_gym.factory import DATASETS

    name, options = parse_options(spec)
    if name not in DATASETS:
        raise DataError(f"{spec}: no such reasoning-gym task{_hint(name, DATASETS)}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    for option in options:
        if option not in known:
            raise DataError(f"{spec}: the task has no option {option!r}{_hint(option, known)}")
    try:
        return reasoning_gym.create_dataset(name, **{"seed": 0, "size": 1000} | options)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{spec}: {error or 'the options do not fit the task'}.") from None


def _hint(name, names):
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(names))}."


def _reasoning_gym(spec: str) -> Iterable[tuple[str, Any]]:
    for i, entry in enumerate(reasoning_gym_task(spec)):
        yield (
            f"{spec}, row {i}",
            {
                "question": entry["question"],
                "answer": str(entry["answer"]),
                "metadata": entry,
            },
        )


def _tfds(spec: str) -> Sequence[Any]:
    try:
        import tensorflow_datasets
    except ImportError:
        raise ModuleNotFoundError("tfds: sources need pip install 'jaxft[tfds]'") from None
    name, options = parse_options(spec)
    source = tensorflow_datasets.data_source(name, **{"split": "train"} | options)
    return [{key: _decode(value) for key, value in row.items()} for row in source]


def _decode(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray) else value


def _hub(spec: str) -> Iterable[Any]:
    name, options = parse_options("hub:" + spec)
    datasets, limit = _datasets(), options.pop("limit", None)

    def open_rows(start):
        rows = datasets.load_dataset(name, **{"split": "train"} | options)
        rows = rows if limit is None else rows.take(limit)
        return rows.skip(start) if start else rows

    return retried(lambda start: _clean(open_rows(start)), f"{spec}: no such file; from the hub it")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError("this source needs pip install 'jaxft[text]'") from None
    return datasets
