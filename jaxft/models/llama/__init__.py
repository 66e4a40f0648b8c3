"""Llama and models with its architecture: SmolLM2, TinyLlama."""

from jaxft.models.llama.record import LLAMA

__all__ = ["LLAMA"]
