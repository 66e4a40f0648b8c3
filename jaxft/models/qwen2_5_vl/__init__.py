"""Qwen2.5-VL: Qwen 2 with positions in time, height and width, and images of any size."""

from jaxft.models.qwen2_5_vl.record import QWEN2_5_VL

__all__ = ["QWEN2_5_VL"]
