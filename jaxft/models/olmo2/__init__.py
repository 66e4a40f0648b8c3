"""OLMo 2: norms after attention and MLP, and over all queries and keys of a token."""

from jaxft.models.olmo2.record import OLMO2

__all__ = ["OLMO2"]
