"""Gemma 4, text only: per-layer embeddings, layers that share keys and values, heads of two sizes."""

from jaxft.models.gemma4.record import GEMMA4

__all__ = ["GEMMA4"]
