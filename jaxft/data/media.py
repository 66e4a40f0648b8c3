"""Images and clips of records: read from their usual forms, and placed in texts by markers.

In the content of a message, or in plain text, a marker such as "<image>" stands for each image. The key
`_media` of the message, or of a record of plain text, holds the images and clips in the order of the markers.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.errors import DataError

# The key of a message, or of a record of plain text, that holds its images and clips.
MEDIA = "_media"
# The kinds of media, and the marker of each in a text.
MARKERS = {"image": "<image>", "audio": "<audio>"}
_MARKER = re.compile(f"({'|'.join(map(re.escape, MARKERS.values()))})")
# Columns of records, and keys of messages, that hold media: name -> kind.
MEDIA_COLUMNS = {name: kind for kind in MARKERS for name in (kind, f"{kind}s")}
# Types of the parts of a message's content -> kind.
_PARTS = {
    name: kind for kind in MARKERS for name in (kind, f"{kind}s", f"{kind}_url", f"input_{kind}")
}
_SOURCES = ("path", "url", "bytes", "data", "array")
_NAME = 200  # characters of a path in a message
ORIENTATION = 0x0112  # the tag of EXIF that says how a camera was held


@dataclasses.dataclass(frozen=True, eq=False)
class Media:
    """One image or clip that has not been read: a path, the bytes of a file, an array or a PIL image.

    Two of them are equal if they have the same kind and the same file, bytes or values.
    """

    kind: str  # a key of MARKERS
    value: Any
    rate: int | None = None  # samples per second of an array
    folder: str = ""  # from which a relative path counts

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the kind and the path, bytes or values; a path as it is written, in any folder."""
        digest = hashlib.sha256(f"{self.kind} {self.rate} ".encode())
        if isinstance(self.value, str):
            digest.update(self.value.encode())
        elif isinstance(self.value, bytes):
            digest.update(self.value)
        else:
            # The values of a PIL image have a meaning only with its mode, palette and orientation.
            for part in _beside_values(self.value):
                digest.update(part)
            array = np.asarray(self.value)
            digest.update(f"{array.shape} {array.dtype} ".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def identity(self) -> str:
        """Equal for equal media: the digest, and the folder of a relative path."""
        if self.path is None:
            return self.digest
        return f"{self.digest} {os.path.abspath(self.path.parent)}"

    @property
    def path(self) -> pathlib.Path | None:
        """The path of the file; None for bytes and arrays."""
        if not isinstance(self.value, str):
            return None
        return pathlib.Path(self.folder, os.path.expanduser(self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Media) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        name = self.value if isinstance(self.value, str) else f"{self.kind} {self.digest}"
        return name if len(name) <= _NAME else f"{name[:_NAME]}..."

    __repr__ = __str__


def read_media(kind: str, value: Any) -> Media:
    """Reads one image or clip in any of its usual forms.

    These are a path, a file's bytes, an array, a PIL image, "data:...;base64,..." and a dict, as of
    `datasets` or OpenAI's API, with one of them under "path", "url", "bytes", "data" or "array" (with
    "sampling_rate").

    Raises:
        DataError: for another form, or an address in the internet, which is not read.
    """
    if isinstance(value, Media):
        return value
    rate = None
    if isinstance(value, Mapping):
        rate = value.get("sampling_rate")
        given = [
            value[name]
            for name in ("bytes", "array", "path", "url", "data")
            if value.get(name) is not None
        ]
        if not given:
            raise DataError(
                f"the {kind} {value!r:.60} holds none of {', '.join(_SOURCES)}; give a path.",
                "schema",
            )
        if "data" in value and isinstance(value["data"], str) and given[0] is value["data"]:
            given = [_decoded(kind, value["data"])]
        value = given[0]
    if isinstance(value, pathlib.Path):
        value = str(value)
    if isinstance(value, str):
        value = _from_text(kind, value)
    if isinstance(value, (bytearray, memoryview)):
        value = bytes(value)
    if isinstance(value, list):
        value = _array(kind, value)
    if hasattr(value, "getbands"):
        value = _loaded(kind, value)
    if isinstance(value, (str, bytes)) or hasattr(value, "__array__") or hasattr(value, "getbands"):
        return Media(kind, value, rate)
    raise DataError(
        f"an {kind} must be a path, bytes or an array, got {type(value).__name__}: {value!r:.40}.",
        "schema",
    )


def read_part(part: Mapping[str, Any]) -> tuple[str, Media | None] | None:
    """(kind, image or clip) of a part of a message's content; None if it is of another type.

    The second is None for a bare {"type": "image"}, whose image is in the record's column `images`.
    """
    said = part.get("type")
    kind = _PARTS.get(said) if isinstance(said, str) else None
    if kind is None:
        return None
    names = (said, kind, f"{kind}_url", *_SOURCES)
    given = [part[name] for name in dict.fromkeys(names) if part.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"the part {part!r:.60} gives its {kind} twice; give one.", "schema")
    if part.get("text"):
        raise DataError(
            f"the part {part!r:.60} is an {kind} and has a text; give each its own part.", "schema"
        )
    if not given:
        return kind, None
    rate = part.get("sampling_rate")
    bare = rate is not None and not isinstance(given[0], (str, bytes, Mapping, Media))
    return kind, read_media(kind, {"array": given[0], "sampling_rate": rate} if bare else given[0])


def media_in(record: Mapping[str, Any]) -> list[Media]:
    """The images and clips of a record, in order."""
    own = list(record.get(MEDIA) or ())
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        turns = record.get(name)
        if isinstance(turns, (list, tuple)):
            own += [
                one for turn in turns if isinstance(turn, Mapping) for one in turn.get(MEDIA, ())
            ]
    return own


def with_media(record: Mapping[str, Any], media: Sequence[Media]) -> dict[str, Any]:
    """The record with other images and clips instead of its, such as those of another record.

    Raises:
        DataError: for another number of them than the record has, or other kinds.
    """
    kinds = [[one.kind for one in some] for some in (media_in(record), media)]
    if kinds[0] != kinds[1]:
        raise DataError(f"with_media: {kinds[1]} cannot take the places of {kinds[0]}.", "schema")
    rest = iter(media)
    put = lambda one: one | {MEDIA: tuple(next(rest) for _ in one[MEDIA])}
    made = put(dict(record)) if record.get(MEDIA) else dict(record)
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        if isinstance(made.get(name), (list, tuple)):
            turns = made[name]
            made[name] = [put(x) if isinstance(x, Mapping) and MEDIA in x else x for x in turns]
    return made


def place_media(record: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the columns `image`, `images`, `audio` and `audios` to the messages or the text of their markers.

    Without any marker, they stand in front of the first user message or of the text, as in TRL.

    Raises:
        DataError: if there are more or fewer markers than images or clips.
    """
    record = dict(record)
    for kind, marker in MARKERS.items():
        columns = {name: _listed(record.get(name)) for name in (kind, f"{kind}s")}
        values = [(name, value) for name in columns for value in columns[name]]
        if values:
            record = {name: value for name, value in record.items() if not columns.get(name)}
            record = _placed(record, kind, marker, [_of_column(kind, *pair) for pair in values])
    return record


def resolved(record: dict[str, Any], folder: str) -> dict[str, Any]:
    """The record, whose relative paths of images and clips count from `folder`."""
    at = lambda media: tuple(dataclasses.replace(one, folder=folder) for one in media)
    holds = lambda one: isinstance(one, dict) and MEDIA in one
    turn = lambda one: one | {MEDIA: at(one[MEDIA])} if holds(one) else one
    made = {
        name: [turn(one) for one in value] if isinstance(value, list) else value
        for name, value in record.items()
    }
    return made | ({MEDIA: at(record[MEDIA])} if record.get(MEDIA) else {})


def without_markers(text: str, kinds: Iterable[str]) -> list[str]:
    """The pieces of a text between its markers of these kinds that are not blank."""
    markers = {MARKERS[kind] for kind in kinds}
    pieces = re.split("|".join(map(re.escape, markers)), text) if markers else [text]
    return [piece for piece in pieces if piece.strip()]


def kinds_of(message: Mapping[str, Any]) -> list[str]:
    """The kinds of media that a message holds; markers of other kinds are a part of its text."""
    return sorted({one.kind for one in message.get(MEDIA, ())})


def as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts, as chat templates of models with media read it."""
    kinds = {MARKERS[kind]: kind for kind in kinds_of(message)}
    found = "|".join(map(re.escape, kinds))
    pieces = re.split(f"({found})", message["content"]) if kinds else [message["content"]]
    parts = [
        {"type": kinds[piece]} if piece in kinds else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
    rest = {name: value for name, value in message.items() if name != MEDIA}
    return rest | {"content": parts or [{"type": "text", "text": ""}]}


def _of_column(kind, name, value):
    try:
        return read_media(kind, value)
    except DataError as error:
        hint = f"; or leave the column {name!r} out with --fields {name} ''."
        raise DataError(str(error).rstrip(".") + hint, error.code) from None


def _placed(record, kind, marker, media):
    """Puts the media of a column where the markers of its kind are."""
    name = next((n for n in ("messages", "prompt", "text") if record.get(n) is not None), None)
    if name is None:
        raise DataError(
            f"the record has {kind}s and neither messages nor text to show them in.", "schema"
        )
    held = record[name]
    turns = held if isinstance(held, list) else [{"role": "user", "content": held}]
    if any(one.kind == kind for one in media_in({"messages": turns})):
        raise DataError(
            f"the {kind}s are given twice, in the messages and in a column; leave one out "
            f"(--fields {kind}s '').",
            "schema",
        )
    count = sum(turn["content"].count(marker) for turn in turns)
    if not count:
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
        put = turns[first] | {"content": marker * len(media) + turns[first]["content"]}
        turns, count = [*turns[:first], put, *turns[first + 1 :]], len(media)
    if count != len(media):
        raise DataError(
            f"{count} {marker} in the text and {len(media)} {kind}s; give one for each.", "schema"
        )
    if any(turn["role"] == "assistant" and marker in turn["content"] for turn in turns):
        raise DataError(
            f"{marker} stands in an answer, where no {kind} is asked about; leave it out there, or give "
            f"the {kind} as a part of the answer's content.",
            "schema",
        )
    made, left = [], list(media)
    for turn in turns:
        own = [left.pop(0) for _ in range(turn["content"].count(marker))]
        made.append(turn | {MEDIA: _merged(turn, own)} if own else turn)
    if isinstance(held, list):
        return record | {name: made}
    before = {"content": made[0]["content"], MEDIA: tuple(record.get(MEDIA) or ())}
    return record | {name: made[0]["content"], MEDIA: _merged(before, media)}


def _merged(turn, own):
    """All media of a message in the order of its markers, of which `own` have been added."""
    left = {
        kind: [one for one in (*turn.get(MEDIA, ()), *own) if one.kind == kind] for kind in MARKERS
    }
    kinds = {marker: kind for kind, marker in MARKERS.items()}
    found = _MARKER.findall(turn["content"])
    return tuple(left[kinds[marker]].pop(0) for marker in found if left[kinds[marker]])


def _listed(value):
    if isinstance(value, str) and value.lstrip().startswith("["):  # as in the cells of a table
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None or (isinstance(value, (str, list, tuple, Mapping)) and not len(value)):
        return []
    numbers = isinstance(value, (list, tuple)) and isinstance(value[0], (int, float, list))
    return list(value) if isinstance(value, (list, tuple)) and not numbers else [value]


def _from_text(kind, text):
    if text.startswith("data:"):
        head, comma, encoded = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise DataError(
                f"the {kind} {text[:40]!r}... is not base64; write data:TYPE;base64,...", "schema"
            )
        return _decoded(kind, encoded)
    if re.match(r"\w+://", text) and not text.startswith("file://"):
        raise DataError(
            f"the {kind} {text[:60]} is an address, which is not read; download the file and give its path.",
            "schema",
        )
    if text.startswith("file://"):
        path = urllib.parse.unquote(text.removeprefix("file://"))
        return path.removeprefix("localhost") if path.startswith("localhost/") else path
    if not text.strip():
        raise DataError(f"the path of an {kind} is empty; give a path.", "schema")
    return text


def _loaded(kind, image):
    """A PIL image, whose pixels are in memory: their values tell it from others."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"the {kind} {image!r:.60} cannot be read ({error!s:.80}); give its path.",
            "schema",
        ) from None
    return image


def _beside_values(value):
    """Yields the mode, palette, transparency and orientation of a PIL image; nothing for an array."""
    if not hasattr(value, "getbands"):
        return
    # An array and the image of its values are the same picture.
    if value.mode not in ("L", "RGB", "RGBA"):
        yield f"{value.mode} ".encode()
    if value.palette is not None:
        yield value.palette.mode.encode() + value.palette.tobytes()
    if (clear := value.info.get("transparency")) is not None:
        yield f"clear {clear} ".encode()
    if (held := value.getexif().get(ORIENTATION, 1)) != 1:
        yield f"held {held} ".encode()


def _decoded(kind, text):
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(
            f"the data of an {kind} are not base64; write them again.", "schema"
        ) from None


def _array(kind, value):
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.zeros(0, object)
    if array.dtype.kind not in "uif" or not array.size:
        raise DataError(
            f"an {kind} must be a path, bytes or an array, got {value!r:.40}.", "schema"
        )
    return array
