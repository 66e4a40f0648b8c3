"""Mistral: Llama with a window on every layer."""

from jaxft.models.mistral.record import MISTRAL

__all__ = ["MISTRAL"]
