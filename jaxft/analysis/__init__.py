"""What fine-tuning does to a model, measured."""

from jaxft.analysis.intrinsic_dimension import D90, d90_search, satisfactory

__all__ = ["D90", "d90_search", "satisfactory"]
