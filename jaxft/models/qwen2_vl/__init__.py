"""Qwen2-VL: Qwen 2 with positions in time, height and width, and images of any size, without windows."""

from jaxft.models.qwen2_vl.record import QWEN2_VL

__all__ = ["QWEN2_VL"]
