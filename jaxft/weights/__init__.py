"""Structured weights: what may stand where a model has a kernel."""

from jaxft.weights.base import (
    Frozen,
    Transposed,
    Weight,
    WeightLike,
    along_last,
    frozen_field,
    is_weight,
    matmul,
    take,
    to_dense,
)
from jaxft.weights.dora import DoraWeight, dora_weight
from jaxft.weights.hadamard import LohaWeight, LokrWeight, loha_weight, lokr_weight
from jaxft.weights.lora import LoraWeight, lora_weight, pissa_to_lora, pissa_weight
from jaxft.weights.monarch import (
    Blocks,
    MonarchWeight,
    monarch_blocks,
    monarch_cost,
    monarch_project,
    monarch_weight,
)
from jaxft.weights.paca import PacaWeight, delta, paca_weight
from jaxft.weights.quantised import (
    Nf4Weight,
    QuantisedWeight,
    bits_per_parameter,
    nf4_weight,
    quantisation_error,
    quantised_weight,
)
from jaxft.weights.qwix_arrays import from_qwix, to_qwix
from jaxft.weights.scaled import ScaledWeight, scaled_weight
from jaxft.weights.vera import VeraWeight, vera_weight

__all__ = [
    "Blocks",
    "DoraWeight",
    "Frozen",
    "LohaWeight",
    "LokrWeight",
    "LoraWeight",
    "MonarchWeight",
    "Nf4Weight",
    "PacaWeight",
    "QuantisedWeight",
    "ScaledWeight",
    "Transposed",
    "VeraWeight",
    "Weight",
    "WeightLike",
    "along_last",
    "bits_per_parameter",
    "delta",
    "dora_weight",
    "from_qwix",
    "frozen_field",
    "is_weight",
    "loha_weight",
    "lokr_weight",
    "lora_weight",
    "matmul",
    "monarch_blocks",
    "monarch_cost",
    "monarch_project",
    "monarch_weight",
    "nf4_weight",
    "paca_weight",
    "pissa_to_lora",
    "pissa_weight",
    "quantisation_error",
    "quantised_weight",
    "scaled_weight",
    "take",
    "to_dense",
    "to_qwix",
    "vera_weight",
]
