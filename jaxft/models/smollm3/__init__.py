"""SmolLM3: Llama with some layers without positions."""

from jaxft.models.smollm3.record import SMOLLM3

__all__ = ["SMOLLM3"]
