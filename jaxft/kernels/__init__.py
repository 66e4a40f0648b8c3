"""Kernels, each beside its plain reference and behind one public function."""

from jaxft.kernels.attention import attend, attention, attention_mask
from jaxft.kernels.linear_log_probs import linear_log_probs

__all__ = ["attend", "attention", "attention_mask", "linear_log_probs"]
