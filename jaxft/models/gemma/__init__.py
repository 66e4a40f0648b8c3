"""Gemma: scaled embeddings, norms that multiply by 1 + scale."""

from jaxft.models.gemma.record import GEMMA

__all__ = ["GEMMA"]
