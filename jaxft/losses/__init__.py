"""Losses: arrays in, values out; no model, no tokenizer, no reduction that is not in the name."""

from jaxft.losses.divergences import (
    gaussian_kernel,
    inverse_multiquadric_kernel,
    kl_divergence,
    l2_distance,
    maximum_mean_discrepancy,
    reverse_kl_divergence,
    symmetric_kl_divergence,
)
from jaxft.losses.supervised import cross_entropy, linear_cross_entropy, linear_log_probs

__all__ = [
    "cross_entropy",
    "gaussian_kernel",
    "inverse_multiquadric_kernel",
    "kl_divergence",
    "l2_distance",
    "linear_cross_entropy",
    "linear_log_probs",
    "maximum_mean_discrepancy",
    "reverse_kl_divergence",
    "symmetric_kl_divergence",
]
