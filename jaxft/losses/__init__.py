"""Losses: arrays in, values out; no model, no tokenizer, no reduction that is not in the name."""

from jaxft.losses.supervised import cross_entropy, linear_cross_entropy, linear_log_probs

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_log_probs"]
