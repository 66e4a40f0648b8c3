"""The document with a gold alignment that the authors of corpus mining released, with its translations.

shyyhs/CourseraParallelCorpusMining, folder src/alignment_algo: 92 Japanese and 76 English sentences. Japanese
files are segmented by Juman++.
"""

from __future__ import annotations

import pathlib
import re

from experiments.worlds import parallel_texts as texts
from jaxft.data import mining

FILES = ("doc.ja.txt.tok", "doc.en.txt", "doc.trans_ja.txt.tok", "doc.trans_en.txt")
GOLD = "gold_alignment_res.txt"


def load(directory: str) -> texts.Document:
    """Returns the document, Japanese as its source.

    The line "51 51" of the gold file, between "60 50" and "62 52", is read as "61 51": the sentences are
    translations of each other.

    Raises:
        DataError: for a missing file.
    """
    root = pathlib.Path(directory)
    sides = [mining.read_sentences(root / name) for name in FILES]
    words = [[re.findall(r"\w+|[^\w\s]", text.lower()) for text in side] for side in sides]
    pairs = mining.parse_pairs("\n".join(mining.read_sentences(root / GOLD)), GOLD)
    corrected = {((50,), (50,)): ((60,), (50,))}
    return texts.Document(*words, [corrected.get(pair, pair) for pair in pairs])


def vocabularies(document: texts.Document) -> list[list[str]]:
    """Returns the words of either language, sorted."""
    sides = (
        (document.source, document.source_of_target),
        (document.target, document.target_of_source),
    )
    return [sorted({w for side in pair for words in side for w in words}) for pair in sides]
