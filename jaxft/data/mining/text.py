"""Plain text of documents: files of one sentence a line, and sentences of running text."""

from __future__ import annotations

import os
import pathlib
import re
import unicodedata

from jaxft.data.errors import DataError

# After . ! ? with a space behind it, or after a full-width mark; closing quotes stay with the sentence.
_END = re.compile(
    r"(?<=[.!?])\s+(?=[^a-z\s])|(?<=[。！？])(?![。！？」』）])\s*|(?<=[。！？][」』）])\s*"
)


def read_sentences(path: str | os.PathLike) -> list[str]:
    """Returns the lines of a UTF-8 file, NFKC-normalised and stripped; empty lines count as sentences.

    Line i of a file and of its translation belong together, so no line is left out.

    Raises:
        DataError: for a missing file, or one that is not UTF-8, with the place of the first wrong byte.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8.",
            "encoding",
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    lines = text.split("\n")  # not splitlines, which also splits at U+2028 and form feeds
    lines = lines[:-1] if lines[-1] == "" else lines
    return [unicodedata.normalize("NFKC", line).strip() for line in lines]


def split_sentences(text: str) -> list[str]:
    """Splits running text (subtitles joined by spaces, a paragraph) after . ! ? and their full-width forms.

    A stop before a lower-case letter does not end a sentence ("e.g. this").
    """
    # Before NFKC, which makes ! of its full-width form.
    pieces = _END.split(" ".join(text.split()))
    return [unicodedata.normalize("NFKC", piece).strip() for piece in pieces if piece.strip()]
