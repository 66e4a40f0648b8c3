"""Kernels, each behind one public function and beside its plain reference."""

from jaxft.kernels.attention import attend, attend_cache, attention, attention_mask
from jaxft.kernels.fwht import fwht
from jaxft.kernels.linear_log_probs import linear_log_probs

__all__ = ["attend", "attend_cache", "attention", "attention_mask", "fwht", "linear_log_probs"]
