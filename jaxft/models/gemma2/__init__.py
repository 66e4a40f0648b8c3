"""Gemma 2: norms after each sublayer too, windows on every other layer, soft caps."""

from jaxft.models.gemma2.record import GEMMA2

__all__ = ["GEMMA2"]
