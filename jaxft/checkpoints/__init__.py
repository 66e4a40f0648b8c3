"""Checkpoints: Hugging Face directories in and out, GGUF in, small models by name."""

from jaxft.checkpoints.merged import save_merged
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
    "check_tokenizer",
    "end_tokens",
    "fetch",
    "load_model",
    "load_tokenizer",
    "model_shapes",
    "open_model",
    "resolve",
    "save_merged",
    "save_model",
]
