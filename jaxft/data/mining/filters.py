"""Filters of sentence pairs, and the check that no document is in two splits."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxft.data.errors import DataError

TextPair = tuple[str, str]
Keep = Callable[[str, str], bool]  # (source, target) -> whether the pair is kept


def clean(
    pairs: Iterable[TextPair], filters: Mapping[str, Keep]
) -> tuple[list[TextPair], dict[str, int]]:
    """Returns (the pairs that all filters keep, {name of a filter: pairs that it was the first to refuse}).

    Filters are functions of (source, target); a language filter is
    `lambda source, target: detect(source) == "en" and detect(target) == "ja"` with any detector.
    """
    kept, refused = [], dict.fromkeys(filters, 0)
    for pair in pairs:
        name = next((name for name, keep in filters.items() if not keep(*pair)), None)
        if name is None:
            kept.append(pair)
        else:
            refused[name] += 1
    return kept, refused


def length_ratio(most: float, measure: Callable[[str], int] | None = None) -> Keep:
    """Returns a filter that keeps pairs whose lengths differ at most by the factor `most`.

    Pairs with an empty side are never kept.

    Args:
        measure: text -> its length; None: number of words between spaces. For a language without
            spaces give its segmenter, or compare characters by `len`.

    Raises:
        ValueError: if `most` is below 1, which no pair satisfies.
    """
    if not most >= 1:
        raise ValueError(f"length_ratio: most must be at least 1, got {most}.")
    measure = measure or (lambda text: len(text.split()))

    def keep(source: str, target: str) -> bool:
        shorter, longer = sorted((measure(source), measure(target)))
        return shorter > 0 and longer <= most * shorter

    return keep


def translated(source: str, target: str) -> bool:
    """Returns whether the sides differ after NFKC, case folding and removal of spaces and punctuation.

    Equal sides are untranslated, like a heading or a line of code.
    """
    return _letters(source) != _letters(target)


def without_duplicates(pairs: Iterable[TextPair]) -> list[TextPair]:
    """Returns the pairs in their order, each once, compared as `translated` compares."""
    first: dict[TextPair, TextPair] = {}
    for source, target in pairs:
        first.setdefault((_letters(source), _letters(target)), (source, target))
    return list(first.values())


def check_disjoint(splits: Mapping[str, Sequence[str]]) -> None:
    """Raises DataError if a document's name is in two splits, such as {"train": [...], "test": [...]}.

    Sentences of one lecture resemble each other, so a document must be in one split as a whole.
    """
    for (one, left), (two, right) in itertools.combinations(splits.items(), 2):
        if shared := sorted(set(left) & set(right)):
            raise DataError(
                f"{len(shared)} documents are in both {one} and {two} ({', '.join(shared[:3])}); split by "
                "documents, not by sentences."
            )


def _letters(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c for c in folded if c.isalnum())
    return kept or "".join(folded.split())
