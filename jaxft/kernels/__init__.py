"""Kernels, each beside its plain reference and behind one public function."""

from jaxft.kernels.attention import attend, attend_cache, attention, attention_mask

__all__ = ["attend", "attend_cache", "attention", "attention_mask"]
