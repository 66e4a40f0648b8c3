"""PaliGemma: Gemma with SigLIP, whose image and prompt see each other in both directions."""

from jaxft.models.paligemma.record import PALIGEMMA

__all__ = ["PALIGEMMA"]
