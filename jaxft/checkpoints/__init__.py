"""Checkpoints: Hugging Face directories in and out, GGUF in, small models by name."""

from jaxft.checkpoints.card import hub_id, license_of, model_card, write_card
from jaxft.checkpoints.hub import check_push, push
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
from jaxft.models import CheckpointError

__all__ = [
    "CheckpointError",
    "cache_directory",
    "check_push",
    "fetch",
    "hub_id",
    "license_of",
    "load_model",
    "load_tokenizer",
    "model_card",
    "model_shapes",
    "open_model",
    "push",
    "resolve",
    "save_merged",
    "save_model",
    "write_card",
]
