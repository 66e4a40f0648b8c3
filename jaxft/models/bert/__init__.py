"""BERT, and MiniLM of sentence-transformers."""

from jaxft.models.bert.record import BERT

__all__ = ["BERT"]
