"""Qwen 3: norms on queries and keys."""

from jaxft.models.qwen3.record import QWEN3

__all__ = ["QWEN3"]
