"""Qwen 3 with experts instead of MLPs."""

from jaxft.models.qwen3_moe.record import QWEN3_MOE

__all__ = ["QWEN3_MOE"]
