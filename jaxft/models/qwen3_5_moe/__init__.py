"""Qwen3.5 with experts, the text models: as Qwen3.5, with experts in every layer."""

from jaxft.models.qwen3_5_moe.record import QWEN3_5_MOE

__all__ = ["QWEN3_5_MOE"]
