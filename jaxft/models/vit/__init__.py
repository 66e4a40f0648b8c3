"""ViT: an encoder of the patches of images."""

from jaxft.models.vit.record import VIT

__all__ = ["VIT"]
