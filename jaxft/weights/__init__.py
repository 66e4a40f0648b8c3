"""Structured weights: what may stand where a model has a kernel."""

from jaxft.weights.base import (
    Frozen,
    Transposed,
    Weight,
    WeightLike,
    frozen_field,
    is_weight,
    matmul,
    take,
    to_dense,
)
from jaxft.weights.lora import LoraWeight, lora_weight

__all__ = [
    "Frozen",
    "LoraWeight",
    "Transposed",
    "Weight",
    "WeightLike",
    "frozen_field",
    "is_weight",
    "lora_weight",
    "matmul",
    "take",
    "to_dense",
]
