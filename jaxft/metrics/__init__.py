"""Measures of models: running means, intervals."""

from jaxft.metrics.interval import wilson_interval
from jaxft.metrics.mean import Mean, combine_means

__all__ = ["Mean", "combine_means", "wilson_interval"]
