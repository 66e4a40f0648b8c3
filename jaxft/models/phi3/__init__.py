"""Phi-3 and Phi-4: fused projections, LongRoPE, and rotary positions in a part of each head."""

from jaxft.models.phi3.record import PHI3

__all__ = ["PHI3"]
