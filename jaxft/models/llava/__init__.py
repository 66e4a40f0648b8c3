"""LLaVA 1.5: Llama with CLIP, whose next to last layer's patches are projected by two layers."""

from jaxft.models.llava.record import LLAVA

__all__ = ["LLAVA"]
