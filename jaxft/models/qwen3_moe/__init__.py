"""Qwen 3 with experts in place of its MLPs."""

from jaxft.models.qwen3_moe.record import QWEN3_MOE

__all__ = ["QWEN3_MOE"]
