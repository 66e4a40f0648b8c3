"""Qwen3.5, the dense text models: Gated DeltaNets, and gated attention in every fourth layer."""

from jaxft.models.qwen3_5.record import QWEN3_5

__all__ = ["QWEN3_5"]
