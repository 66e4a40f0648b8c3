"""Choices by letter, and yes or no."""

from __future__ import annotations

import re

POLAR = {"yes": True, "true": True, "no": False, "false": False}
_MENTION = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE)\s+\(?([A-J])\b|\(([A-J])\)"
    r"|\b([A-J]) is (?:the )?(?:correct|right|best)"
)
_PICKED = re.compile(  # "I choose B.", "So it must be (B)"
    r"\b(?:I(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with|think|believe|say|guess)|"
    r"(?:[Ss]o|[Tt]herefore|[Tt]hus|[Hh]ence),?|[Ii]t(?:'s|\s+is|\s+must\s+be)|[Cc](?:orrect|hoice):|"
    r"[Mm]y\s+(?:choice|pick|guess)\s+is)\s+(?:it(?:'s|\s+is|\s+must\s+be)\s+)?"
    r"(?:[Oo]ption\s+|[Cc]hoice\s+)?\(?([A-J])\)?[.!]?$"
)
_DENIED = re.compile(r"(?i)\bnot\b|n't\b|\bwrong\b|\bincorrect\b|\bfalse\b|\bexcept\b|\brather\b")
_LETTER = r"\(?[A-J]\b\)?"
_SEVERAL = re.compile(
    rf"(?:[Oo]ptions?\s+|[Cc]hoices?\s+)?{_LETTER}"
    rf"(?:(?:\s*[,;&]\s*(?:and\s+)?|\s+and\s+|\s+|(?<=\))(?=\()){_LETTER})+"
    r"(?:\s+are\s+(?:both\s+)?(?:correct|right))?[.]?"
)


def labelled(text: str) -> tuple[str, str] | None:
    """(letter, its text) of "(A) Paris", "A. Paris" or "A: Paris"; None for anything else."""
    found = re.fullmatch(r"\(([A-J])\)[.:]?\s*(\S.*)|([A-J])[.):]\s+(\S.*)", text)
    return (found[1] or found[3], found[2] or found[4]) if found else None


def read_choices(text: str) -> frozenset[str] | None:
    """The letters of "A, C", "(A) and (C)" or "AC"; None for one letter and for anything else.

    Letters without a separator count only in alphabetical order: BAD is a word.
    """
    text = re.sub(r"^(?:\[(.*)\]|\{(.*)\})$", r"\1\2", text)
    letters = re.findall(r"\b[A-J]\b", text) if _SEVERAL.fullmatch(text) else None
    if re.fullmatch(r"[A-J]{2,}", text) and list(text) == sorted(set(text)):
        letters = list(text)
    return frozenset(letters) if letters else None


def read_choice(text: str, stated: bool) -> str | None:
    """The letter that a text chooses, or None; `stated`: the text follows "the answer is"."""
    letter = re.match(
        r"\W*(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+(?:-\s*)?)?\(?([A-J])\b(?=\W*$|[).:,*]|\s+(?:because|since|as|is\b(?!\s+(?:not|wrong|incorrect|false|out)\b)|\())",
        text,
        0 if not stated else re.IGNORECASE if len(text.strip("()*. ")) == 1 else 0,
    ) or re.fullmatch(r"\W*(?:[Oo]ption\s+)?\(?([a-j])\W*", text)
    if letter:
        rest = text[letter.end(1) :]
        if re.match(r"\W*(?:or|and|/|&)\W*(?:[Oo]ption\s+)?\(?[A-Ja-j]\b", rest):
            return None
        return None if re.match(r"\)?\s*,\s*\(?[A-J]\b", rest) else letter[1].upper()
    picked = _PICKED.search(re.split(r"(?<=[.!?])\s+|\n", text.strip())[-1])
    if picked and not _DENIED.search(text):
        return picked[1]
    found = {next(filter(None, groups)) for groups in _MENTION.findall(text)}
    return found.pop() if len(found) == 1 and not _DENIED.search(text) else None


def read_polar(text: str, stated: bool) -> bool | None:
    """True for a yes, False for a no, at the beginning, or as the last word; None for neither or both."""
    words = re.split(r"(?<=[.!?:])\s+", text.casefold())
    first = re.match(
        r"\W*(\w+)\b(?=\W*$|[,.;:!*]|\s+(?:because|it|they|he|she|this|that|we|i)\b)", words[0]
    )
    last = re.fullmatch(r"\W*(?:so|therefore|thus|hence)?,?\s*(\w+)\W*", words[-1])
    said = {POLAR[m[1]] for m in (first, None if stated else last) if m and m[1] in POLAR}
    return said.pop() if len(said) == 1 else None
