"""Selection of data: which sentences or passages of a document a model reads."""

from jaxft.data.selection.bm25 import best_passages, bm25_scores
from jaxft.data.selection.lexrank import (
    Idf,
    idf_modified_cosine,
    inverse_document_frequencies,
    lexrank_scores,
    select_sentences,
    sentence_words,
    split_sentences,
    within_budget,
)

__all__ = [
    "Idf",
    "best_passages",
    "bm25_scores",
    "idf_modified_cosine",
    "inverse_document_frequencies",
    "lexrank_scores",
    "select_sentences",
    "sentence_words",
    "split_sentences",
    "within_budget",
]
