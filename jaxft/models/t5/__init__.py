"""T5, T5 1.1 and Flan-T5: text to text, with relative positions."""

from jaxft.models.t5.record import T5

__all__ = ["T5"]
