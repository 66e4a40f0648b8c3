"""Kernels, each beside its plain reference and behind one public function."""

from jaxft.kernels.attention import attend, attention, attention_mask

__all__ = ["attend", "attention", "attention_mask"]
