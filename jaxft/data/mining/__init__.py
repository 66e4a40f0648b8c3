"""Mining of parallel sentences: alignment of documents in two languages, cleaning of the pairs."""

from jaxft.data.mining.alignment import (
    MOVES,
    Alignment,
    Pair,
    align,
    best_path,
    block_similarities,
    greedy_pairs,
    join_pairs,
    parse_pairs,
    sum_vectors,
)
from jaxft.data.mining.filters import (
    check_disjoint,
    clean,
    length_ratio,
    translated,
    without_duplicates,
)
from jaxft.data.mining.lexicon import fit_lexicon
from jaxft.data.mining.text import read_sentences, split_sentences

__all__ = [
    "MOVES",
    "Alignment",
    "Pair",
    "align",
    "best_path",
    "block_similarities",
    "check_disjoint",
    "clean",
    "fit_lexicon",
    "greedy_pairs",
    "join_pairs",
    "length_ratio",
    "parse_pairs",
    "read_sentences",
    "split_sentences",
    "sum_vectors",
    "translated",
    "without_duplicates",
]
