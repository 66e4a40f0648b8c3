"""Measurements of fine-tuned models."""

from jaxft.analysis.intrinsic_dimension import D90, d90_search, satisfactory
from jaxft.analysis.sentences import text_embeddings
from jaxft.analysis.sharpness import epsilon_sharpness, filter_normalised, linear_cka, loss_along

__all__ = [
    "D90",
    "d90_search",
    "epsilon_sharpness",
    "filter_normalised",
    "linear_cka",
    "loss_along",
    "satisfactory",
    "text_embeddings",
]
