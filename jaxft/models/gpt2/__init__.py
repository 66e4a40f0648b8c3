"""GPT-2: learned positions, LayerNorms, query, key and value in one matrix."""

from jaxft.models.gpt2.record import GPT2

__all__ = ["GPT2"]
