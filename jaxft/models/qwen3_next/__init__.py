"""Qwen3-Next: Gated DeltaNets, gated attention in every fourth layer, experts."""

from jaxft.models.qwen3_next.record import QWEN3_NEXT

__all__ = ["QWEN3_NEXT"]
