"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from jaxft.models.qwen2.record import QWEN2

__all__ = ["QWEN2"]
