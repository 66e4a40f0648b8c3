"""Measures of models: running means, intervals, wins at equal length."""

from jaxft.metrics.interval import wilson_interval
from jaxft.metrics.length import length_controlled_rate
from jaxft.metrics.mean import Mean, combine_means

__all__ = ["Mean", "combine_means", "length_controlled_rate", "wilson_interval"]
