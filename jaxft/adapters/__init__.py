"""Adapters: rewrite a params tree, split it, merge it, save and load what trains."""

from jaxft.adapters.peft import AdapterError, load_adapter, save_adapter
from jaxft.adapters.rewrite import (
    ALL_LINEAR,
    adapt,
    combine,
    count,
    full,
    lora,
    merge,
    partition,
    path_name,
    trainable_mask,
)

__all__ = [
    "ALL_LINEAR",
    "AdapterError",
    "adapt",
    "combine",
    "count",
    "full",
    "load_adapter",
    "lora",
    "merge",
    "partition",
    "path_name",
    "save_adapter",
    "trainable_mask",
]
