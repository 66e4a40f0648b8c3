"""BART: summaries and other texts from texts."""

from jaxft.models.bart.record import BART

__all__ = ["BART"]
