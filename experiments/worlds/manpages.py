"""Real parallel text: manual pages in English and Japanese, as Debian's `manpages-ja` installs them.

Many translated sections keep the layout of the original: if both have the same sequence of headings and
paragraphs, paragraph i of one is the translation of paragraph i of the other. These sections give a true
alignment, and `parallel_texts.edited` then merges, splits, deletes and inserts paragraphs. Translation is by
word probabilities of IBM model 1, fitted to pages that are not measured.
"""

from __future__ import annotations

import collections
import gzip
import html
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.worlds import parallel_texts as texts
from jaxft.data import DataError, mining

BREAKS = {
    "SH",
    "SS",
    "PP",
    "P",
    "LP",
    "TP",
    "HP",
    "IP",
    "TQ",
    "RS",
    "RE",
    "SY",
    "YS",
    "Sh",
    "Ss",
    "Pp",
}
FONTS = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB", "MR", "UR", "UE", "UN"}
ENDS = {"nf": "fi", "EX": "EE", "TS": "TE", "de": ".", "ig": ".", "if": "", "ie": "", "el": ""}
ESCAPES = [
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)|\\s[-+]?\d+|\\[&|^,/%:)c]|\\\n"), ""),
    (re.compile(r"\\\(aq|\\\(cq|\\\(oq|\\\[aq\]"), "'"),
    (re.compile(r"\\\(lq|\\\(rq|\\\(dq"), '"'),
    (re.compile(r"\\\((?:en|em)|\\-|\\\(mi"), "-"),
    (re.compile(r"\\(?:\(..|\[[^]]*\]|[ ~0])"), " "),
    (re.compile(r"\\e|\\\(rs"), r"\\"),
]
# English words; of Japanese, words of other letters, runs of katakana and of kanji. Hiragana are mostly
# endings and particles, and no segmenter is needed without them.
WORD = re.compile(r"[a-z0-9_]+|[ァ-ヴー]+|[一-龥]+")


class Page(NamedTuple):
    """The paragraphs of a page in both languages, and those that are known to correspond."""

    name: str  # "cp.1"
    source: list[str]
    target: list[str]
    pairs: list[tuple[str, str]]  # paragraphs of sections with the same layout, in order

    @property
    def parallel(self) -> bool:
        """Returns whether the pairs are enough for a document."""
        return len(self.pairs) >= 10


class Lexicon(NamedTuple):
    """Vocabularies of both languages with the probabilities of translations."""

    source: dict[str, int]
    target: dict[str, int]
    forward: np.ndarray  # [S, T], t(target word | source word)
    backward: np.ndarray  # [T, S]


def paragraphs(roff: str) -> list[tuple[str, str]]:
    """Returns (macro that begins it, text) of each block of a page in man's or mdoc's macros.

    Comments, tables, literal blocks and conditionals are left out.
    """
    blocks: list[tuple[str, list[str]]] = []
    until = None
    for line in roff.splitlines():
        macro, _, rest = line[1:].strip().partition(" ")
        control = line[:1] in (".", "'")
        if until is not None:
            until = None if control and macro == until else until
        elif not control:
            blocks[-1:] and blocks[-1][1].append(line)
        elif macro in BREAKS:
            blocks.append((macro, [rest.strip('"')] if macro in ("SH", "SS", "Sh", "Ss") else []))
        elif macro in ENDS:
            until = ENDS[macro] or None
        elif macro in FONTS and blocks:
            blocks[-1][1].append(rest.replace('"', ""))
    return [(macro, _plain(" ".join(lines))) for macro, lines in blocks]


def _plain(text):
    for pattern, replacement in ESCAPES:
        text = pattern.sub(replacement, text)
    return " ".join(html.unescape(text).split())


def load(directory: str, language: str = "ja") -> list[Page]:
    """Returns the pages in both languages under `directory`, such as /usr/share/man.

    Raises:
        DataError: if the directory has no page in both languages, with the command that installs them.
    """
    root = pathlib.Path(directory)
    pages = []
    for path in sorted(root.glob(f"{language}/man*/*")):
        original = root / path.parent.name / path.name
        if not original.is_file():
            continue
        blocks = [paragraphs(_read(file)) for file in (original, path)]
        sides = [[text for _, text in side if text] for side in blocks]
        if min(map(len, sides)) >= 10:
            pages.append(Page(path.name.removesuffix(".gz"), *sides, _pairs(*blocks)))
    if not any(page.parallel for page in pages):
        raise DataError(
            f"--data manpages: {root} has {len(pages)} pages in English and in '{language}', none with "
            "sections of the same layout; install them by `apt-get install manpages "
            f"manpages-{language}`, or unpack both packages (apt-get download, dpkg-deb -x "
            "PACKAGE DIRECTORY) and give --directory DIRECTORY/usr/share/man."
        )
    return pages


def _pairs(source, target):
    """The paragraphs of sections that have the same macros, if both sides have as many sections."""
    sides = [[], []]
    for side, blocks in zip(sides, (source, target), strict=True):
        for macro, text in blocks:
            if macro in ("SH", "Sh") or not side:
                side.append([])
            side[-1].append((macro, text))
    found = []
    for one, two in zip(*sides, strict=True) if len(sides[0]) == len(sides[1]) else ():
        if [macro for macro, _ in one] == [macro for macro, _ in two]:
            found += [(a, b) for (_, a), (_, b) in zip(one, two, strict=True) if a and b]
    return found


def _read(path):
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return data.decode("utf-8", "replace")


def words_of(text: str) -> list[str]:
    """Returns the words that are compared, in lower case."""
    return WORD.findall(text.lower())


def fitted(pages: Sequence[Page], most_words: int = 1500, most_pairs: int = 3000) -> Lexicon:
    """Fits the lexicon in both directions to the paragraphs of the pages."""
    pairs = [pair for page in pages for pair in page.pairs]
    sides = [[words_of(text) for text in side] for side in zip(*pairs[:most_pairs], strict=True)]
    vocabularies = []
    for side in sides:
        counts = collections.Counter(word for words in side for word in set(words))
        vocabularies.append({word: i for i, (word, _) in enumerate(counts.most_common(most_words))})
    counts = [counted(side, words) for side, words in zip(sides, vocabularies, strict=True)]
    forward, backward = (mining.fit_lexicon(*pair) for pair in (counts, counts[::-1]))
    return Lexicon(*vocabularies, forward, backward)


def counted(sentences: Sequence[texts.Words], vocabulary: dict[str, int]) -> np.ndarray:
    """Returns [N, V], how often each word is in each sentence."""
    counts = np.zeros((len(sentences), len(vocabulary)))
    for row, words in zip(counts, sentences, strict=True):
        for word in words:
            if word in vocabulary:
                row[vocabulary[word]] += 1
    return counts


def edited(rng: np.random.Generator, page: Page, others: Sequence[Page]) -> texts.Document:
    """Returns the pairs of a page as a document of words, edited; insertions come from the other pages.

    A paragraph whose versions have the same number of sentences can be split between them.
    """

    def clauses(source: str, target: str) -> texts.Sentence:
        sides = [mining.split_sentences(text) for text in (source, target)]
        if len(sides[0]) != len(sides[1]):
            sides = [[source], [target]]
        return [(words_of(a), words_of(b)) for a, b in zip(*sides, strict=True)]

    def new() -> texts.Sentence:
        other = others[rng.integers(len(others))]
        return clauses(*other.pairs[rng.integers(len(other.pairs))])

    return texts.edited(rng, [clauses(*pair) for pair in page.pairs], new)


def sums_of(
    source: Sequence[texts.Words], target: Sequence[texts.Words], lexicon: Lexicon
) -> list[np.ndarray]:
    """Returns the four arrays of `mining.align`: counts of words, weighted by their rarity in the page."""
    a, b = counted(source, lexicon.source), counted(target, lexicon.target)
    rare_a, rare_b = (np.log((1 + len(x)) / (1 + np.count_nonzero(x, axis=0))) for x in (a, b))
    return [a * rare_a, b * rare_b, (b @ lexicon.backward) * rare_a, (a @ lexicon.forward) * rare_b]


def mined(page: Page, lexicon: Lexicon) -> list[tuple[str, str]]:
    """Returns the pairs of texts that are mined from a page, cleaned."""
    sides = [list(map(words_of, side)) for side in (page.source, page.target)]
    found = mining.align(*sums_of(*sides, lexicon), name=page.name)
    pairs = mining.without_duplicates(mining.join_pairs(found.pairs, page.source, page.target))
    filters = {"length": mining.length_ratio(4.0, len), "untranslated": mining.translated}
    return mining.clean(pairs, filters)[0]
