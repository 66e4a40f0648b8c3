"""OLMoE: norms over all queries and all keys, clipped projections, experts instead of MLPs."""

from jaxft.models.olmoe.record import OLMOE

__all__ = ["OLMOE"]
