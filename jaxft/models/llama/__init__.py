"""Llama and what is built like it: SmolLM2, TinyLlama."""

from jaxft.models.llama.record import LLAMA

__all__ = ["LLAMA"]
