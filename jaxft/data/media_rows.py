"""Images and clips in rendered texts, and the columns of a batch that hold them.

The processor of a model, a `MediaReader`, gives the text that stands for an image and its arrays. Texts are
rendered once; arrays are loaded when a batch is made, so that memory holds those of a few batches.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxft.data.columns import typed
from jaxft.data.errors import DataError
from jaxft.data.media import MARKERS, Media, media_in

Columns = dict[str, np.ndarray]
# Columns that are text, even if it is the name of a file.
_TEXTS = ("id", "text", "prompt", "completion", "chosen", "rejected", "answer", "responses")
_NAMES = {
    "image": re.compile(r"[^\n]+\.(png|jpe?g|webp|gif|bmp|tiff?)(\?[^\s]*)?", re.IGNORECASE),
    "audio": re.compile(r"[^\n]+\.(wav|flac|mp3|ogg|opus|m4a)(\?[^\s]*)?", re.IGNORECASE),
}
_BEGINNINGS = {
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    "audio": (b"RIFF", b"fLaC", b"OggS", b"ID3"),
}


class MediaReader(Protocol):
    """The processor of a model for one kind of media.

    Attributes:
        kind: a key of MARKERS.
        placeholder: the text that the model's chat template writes for one image or clip.
        shapes: column of the batch -> the shape of one of its entries.

    A reader may also have `template`, the chat template of models whose files have none, and `adds_bos`,
    whether a conversation begins with the token that the tokenizer adds although the template lacks it.
    """

    kind: str
    placeholder: str
    shapes: Mapping[str, tuple[int, ...]]

    def text(self, media: Media) -> str:
        """The text that replaces the placeholder, with a token for each of the model's embeddings.

        Raises:
            DataError: if the file is missing, damaged or of another kind.
        """

    def counts(self, media: Media) -> dict[str, int]:
        """Column -> the number of entries of this image or clip."""

    def arrays(self, media: Media) -> Columns:
        """Column -> entries [count, *shape]."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image or clip in a rendered text, with the processor that loads it."""

    media: Media
    reader: MediaReader


@dataclasses.dataclass(frozen=True)
class LateColumn:
    """A column of prompts [B, M, ...], of which rows are loaded when they are picked."""

    name: str
    shown: Sequence[Sequence[Shown]]  # of each prompt

    def __len__(self) -> int:
        return len(self.shown)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.rows(), dtype)

    def rows(self, numbers: Sequence[int] | None = None) -> np.ndarray:
        """The rows of these prompts, all with the M of the prompt that has most; None: of all."""
        like = one_of_each(self.shown)
        numbers = range(len(self.shown)) if numbers is None else numbers
        picked = [self.shown[i] for i in numbers]
        return media_columns(picked, like, (self.name,), _widest(self.shown, self.name))[self.name]


def media_columns(
    rows: Sequence[Sequence[Shown]],
    like: Sequence[Shown],
    names: Sequence[str] | None = None,
    width: int | None = None,
) -> Columns:
    """The columns [B, M, ...] of a batch's rows: the entries of each row in order, then zeros.

    Args:
        rows: the images and clips of each row.
        like: some of each kind in the data, for the columns of batches that have none.
        names: the columns to make; None: all.
        width: M; None: the smallest power of two that fits the row with most entries.
    """
    shapes = {name: shape for one in like for name, shape in one.reader.shapes.items()}
    made = {}
    loaded = [[one.reader.arrays(one.media) for one in row] for row in rows]
    for name, shape in shapes.items():
        if names is not None and name not in names:
            continue
        entries = [[arrays[name] for arrays in row if name in arrays] for row in loaded]
        most = max(sum(map(len, row)) for row in entries)
        kind = next((array.dtype for row in entries for array in row), np.float32)
        column = np.zeros((len(rows), _bucket(most) if width is None else width, *shape), kind)
        for place, row in zip(column, entries, strict=True):
            if row:
                place[: sum(map(len, row))] = np.concatenate(row)
        made[name] = column
    return made


class ShownNumbers:
    """The images and clips of all records. A row holds their numbers, from 1, until its arrays are loaded."""

    def __init__(self, sources: Sequence[Sequence[Any]]):
        rows = [part.media for source in sources for part in source]
        self.all = list(dict.fromkeys(one for row in rows for one in row))
        self._numbers = {one: i for i, one in enumerate(self.all, 1)}
        self._like = one_of_each(rows)

    def __len__(self) -> int:
        return len(self.all)

    def numbers(self, part: Any) -> np.ndarray:
        """[count] int32 of a Tokenised; no record has more images and clips than tokens."""
        return np.array([self._numbers[one] for one in part.media], np.int32)

    def columns(self, batch: Columns) -> Columns:
        """The batch with the columns of its images and clips instead of their numbers."""
        rows = [[self.all[i - 1] for i in row if i] for row in batch["media"].tolist()]
        own = {name: leaf for name, leaf in batch.items() if name != "media"}
        return own | media_columns(rows, self._like)


def one_of_each(rows: Iterable[Sequence[Shown]]) -> list[Shown]:
    """One image or clip of each reader in the rows."""
    return list({one.reader: one for row in rows for one in row}.values())


def prompt_columns(renderer: Any, records: Sequence[Mapping[str, Any]]) -> dict[str, LateColumn]:
    """The columns of the images and clips in the records' prompts, which `generate` and `rl.Prompts` take.

    Empty if no prompt has any.
    """
    show = getattr(renderer, "shown", None)
    return late_columns([() if show is None else show(record) for record in records])


def late_columns(rows: Sequence[Sequence[Shown]]) -> dict[str, LateColumn]:
    """The columns of prompts with these images and clips; empty if there are none."""
    names = {name for row in rows for one in row for name in one.reader.shapes}
    return {name: LateColumn(name, rows) for name in sorted(names)}


class Expanded(NamedTuple):
    """A rendered text with the models' tokens of its images and clips."""

    text: str
    spans: dict[tuple[int, int], float]
    shown: tuple[Shown, ...]
    places: tuple[tuple[int, int], ...] = ()  # of the tokens of each image or clip


def expand(
    text: str,
    spans: Mapping[tuple[int, int], float],
    media: Sequence[Media],
    readers: Sequence[MediaReader],
) -> Expanded:
    """The text in which the models' tokens stand for each placeholder.

    Args:
        text: the rendered text, with a marker or a placeholder for each image or clip.
        spans: character spans of `text`, which are moved along.
        media: in order.
        readers: of the model.

    Raises:
        DataError: if placeholders and media differ in number, or the model reads no such kind.
    """
    check_kinds(media, readers)
    by_text = {
        form: reader for reader in readers for form in (reader.placeholder, MARKERS[reader.kind])
    }
    if not by_text:
        return Expanded(text, dict(spans), ())
    found = list(re.finditer("|".join(map(re.escape, by_text)), text))
    kinds = [by_text[match[0]].kind for match in found]
    if kinds != [one.kind for one in media]:
        count = lambda kind, given: sum(one == kind for one in given)
        given = [one.kind for one in media]
        counts = "; ".join(
            f"{count(reader.kind, kinds)} placeholders and {count(reader.kind, given)} {reader.kind}s"
            for reader in readers
        )
        raise DataError(
            f"the text has {counts}, in this order: {kinds} and {given}; give one {MARKERS[readers[0].kind]} "
            "or one part for each.",
            "schema",
        )
    shown = tuple(Shown(one, by_text[match[0]]) for one, match in zip(media, found, strict=True))
    pieces, end, moves = [], 0, [(0, 0)]  # moves: (character from which on, by how much)
    places = []
    for one, match in zip(shown, found, strict=True):
        put = one.reader.text(one.media)
        pieces += [text[end : match.start()], put]
        end = match.end()
        start = match.start() + moves[-1][1]
        places.append((start, start + len(put)))
        moves.append((end, moves[-1][1] + len(put) - len(match[0])))
    moved = lambda place: place + [by for start, by in moves if start <= place][-1]
    pieces.append(text[end:])
    moved_spans = {(moved(a), moved(b)): w for (a, b), w in spans.items()}
    return Expanded("".join(pieces), moved_spans, shown, tuple(places))


def without_placeholders(text: str, readers: Sequence[MediaReader]) -> str:
    """The text without what stands for the model's images and clips, of a text that has none."""
    forms = {form for reader in readers for form in (reader.placeholder, MARKERS[reader.kind])}
    return re.sub("|".join(map(re.escape, forms)), "", text) if forms else text


def check_kinds(media: Sequence[Media], readers: Sequence[MediaReader]) -> None:
    """Raises DataError for media of a kind that none of the readers reads: all, for a text model."""
    kinds = {reader.kind for reader in readers}
    for one in media:
        if one.kind not in kinds:
            what = f"a model that reads {' and '.join(sorted(kinds))}" if kinds else "a text model"
            raise DataError(
                f"the record has an {one.kind} ({str(one)[:60]}), which {what} cannot be shown; remove it, "
                f"leave the column out with --fields {one.kind}s '', or choose a model that reads it.",
                "schema",
            )


def refuse_unread(record: Mapping[str, Any], readers: Sequence[MediaReader]) -> None:
    """Raises DataError if a record without media has an image or clip of the model's in a column not read."""
    if not readers or media_in(record):
        return
    for name, value in record.items():
        for reader in () if name.startswith("_") or name in _TEXTS else readers:
            if _holds(reader.kind, value):
                raise DataError(
                    f"the column {name!r} seems to hold {reader.kind}s that would not be shown; take it with "
                    f"{typed({f'{reader.kind}s': name})}, or leave it out with {typed({name: ''})}.",
                    "schema",
                )


def _holds(kind, value):
    """Returns whether a value of a column is an image or clip: values, bytes, or the name of a file."""
    if isinstance(value, (list, tuple)):
        return bool(value) and _holds(kind, value[0])
    if isinstance(value, Mapping):
        return any(_holds(kind, value.get(name)) for name in ("bytes", "path", "url")) or (
            kind == "audio" and "array" in value and "sampling_rate" in value
        )
    if isinstance(value, bytes):
        return value.startswith(_BEGINNINGS[kind])
    if isinstance(value, str):
        return len(value) < 1000 and bool(_NAMES[kind].fullmatch(value.strip()))
    return kind == "image" and hasattr(value, "getbands")


def _widest(rows, name):
    counts = (sum(one.reader.counts(one.media).get(name, 0) for one in row) for row in rows)
    return _bucket(max(counts))


def _bucket(count):
    return 1 << max(count - 1, 0).bit_length()
