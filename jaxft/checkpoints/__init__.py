"""Checkpoints: Hugging Face directories in and out, GGUF in and out, small models by name."""

from jaxft.checkpoints.gguf_adapter import load_gguf_adapter, save_gguf_adapter
from jaxft.checkpoints.gguf_write import check_gguf, save_gguf
from jaxft.checkpoints.merged import save_checked_gguf_adapter, save_merged, save_merged_gguf
from jaxft.checkpoints.models import (
    load_model,
    load_tokenizer,
    model_shapes,
    open_model,
    resolve,
    save_model,
)
from jaxft.checkpoints.packages import cache_directory, fetch
from jaxft.checkpoints.pairing import check_tokenizer, end_tokens
from jaxft.models import CheckpointError

__all__ = [
    "CheckpointError",
    "cache_directory",
    "check_gguf",
    "check_tokenizer",
    "end_tokens",
    "fetch",
    "load_gguf_adapter",
    "load_model",
    "load_tokenizer",
    "model_shapes",
    "open_model",
    "resolve",
    "save_checked_gguf_adapter",
    "save_gguf",
    "save_gguf_adapter",
    "save_merged",
    "save_merged_gguf",
    "save_model",
]
