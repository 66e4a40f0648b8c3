"""Structured weights: values that can take the place of a model's kernel."""

from jaxft.weights.base import (
    Frozen,
    Transposed,
    Weight,
    WeightLike,
    along_last,
    frozen_field,
    frozen_grouped,
    frozen_matmul,
    grouped,
    is_weight,
    matmul,
    matmul_float32,
    scaled_bias,
    stored,
    take,
    to_dense,
)
from jaxft.weights.bottleneck import Bottleneck, bottleneck_adapter
from jaxft.weights.convolution import conv
from jaxft.weights.dora import DoraWeight, dora_weight
from jaxft.weights.hadamard import LohaWeight, LokrWeight, factorise, loha_weight, lokr_weight
from jaxft.weights.lora import LoraWeight, lora_weight, pissa_to_lora, pissa_weight
from jaxft.weights.monarch import (
    Blocks,
    MonarchWeight,
    monarch_blocks,
    monarch_cost,
    monarch_project,
    monarch_weight,
)
from jaxft.weights.orthogonal import (
    BoftWeight,
    OftWeight,
    boft_weight,
    butterfly_problem,
    nearest_divisor,
    oft_weight,
)
from jaxft.weights.paca import PacaWeight, check_paca, delta, paca_weight
from jaxft.weights.prefix import PrefixMlp, prefix_mlp
from jaxft.weights.quantised import (
    Nf4Weight,
    QuantisedWeight,
    bits_per_parameter,
    nf4_exact,
    nf4_weight,
    quantisation_error,
    quantised_weight,
)
from jaxft.weights.qwix_arrays import from_qwix, to_qwix
from jaxft.weights.randlora import RandloraWeight, randlora_tables, randlora_weight
from jaxft.weights.random_maps import (
    DenseMap,
    FastfoodMap,
    cropped_fastfood,
    dense_projection,
    fastfood,
)
from jaxft.weights.reshaped import ReshapedWeight
from jaxft.weights.scaled import ScaledWeight, scaled_weight
from jaxft.weights.vera import VeraWeight, vera_tables, vera_weight

__all__ = [
    "Blocks",
    "BoftWeight",
    "Bottleneck",
    "DenseMap",
    "DoraWeight",
    "FastfoodMap",
    "Frozen",
    "LohaWeight",
    "LokrWeight",
    "LoraWeight",
    "MonarchWeight",
    "Nf4Weight",
    "OftWeight",
    "PacaWeight",
    "PrefixMlp",
    "QuantisedWeight",
    "RandloraWeight",
    "ReshapedWeight",
    "ScaledWeight",
    "Transposed",
    "VeraWeight",
    "Weight",
    "WeightLike",
    "along_last",
    "bits_per_parameter",
    "boft_weight",
    "bottleneck_adapter",
    "butterfly_problem",
    "check_paca",
    "conv",
    "cropped_fastfood",
    "delta",
    "dense_projection",
    "dora_weight",
    "factorise",
    "fastfood",
    "from_qwix",
    "frozen_field",
    "frozen_grouped",
    "grouped",
    "is_weight",
    "loha_weight",
    "lokr_weight",
    "lora_weight",
    "frozen_matmul",
    "matmul",
    "matmul_float32",
    "monarch_blocks",
    "monarch_cost",
    "monarch_project",
    "monarch_weight",
    "nearest_divisor",
    "nf4_exact",
    "nf4_weight",
    "oft_weight",
    "paca_weight",
    "pissa_to_lora",
    "pissa_weight",
    "prefix_mlp",
    "quantisation_error",
    "quantised_weight",
    "randlora_tables",
    "randlora_weight",
    "scaled_bias",
    "stored",
    "scaled_weight",
    "take",
    "to_dense",
    "vera_tables",
    "to_qwix",
    "vera_weight",
]
