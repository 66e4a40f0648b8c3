"""Qwen 1.5 and 2 with experts, one of which every token passes."""

from jaxft.models.qwen2_moe.record import QWEN2_MOE

__all__ = ["QWEN2_MOE"]
