"""Granite 3: Llama with scales of the embeddings, residuals, attention and logits."""

from jaxft.models.granite.record import GRANITE

__all__ = ["GRANITE"]
