"""Gemma 3, text only: norms on queries and keys, separate rotary positions under windows."""

from jaxft.models.gemma3.record import GEMMA3

__all__ = ["GEMMA3"]
