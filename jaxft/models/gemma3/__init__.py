"""Gemma 3, text alone: norms on queries and keys, rotary positions of their own under windows."""

from jaxft.models.gemma3.record import GEMMA3

__all__ = ["GEMMA3"]
