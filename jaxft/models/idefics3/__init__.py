"""Idefics3: Llama with SigLIP, whose patches are shuffled into fewer embeddings."""

from jaxft.models.idefics3.record import IDEFICS3

__all__ = ["IDEFICS3"]
