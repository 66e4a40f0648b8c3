"""SmolVLM: the architecture of Idefics3 in small sizes."""

from jaxft.models.smolvlm.record import SMOLVLM

__all__ = ["SMOLVLM"]
