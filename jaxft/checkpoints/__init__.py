"""Checkpoints: reads and writes Hugging Face directories and GGUF files, and loads small models by name."""

from jaxft.checkpoints.card import hub_id, license_of, model_card, write_card
from jaxft.checkpoints.gguf_adapter import load_gguf_adapter, save_gguf_adapter
from jaxft.checkpoints.gguf_write import check_gguf, save_gguf
from jaxft.checkpoints.hub import check_push, push
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
from jaxft.checkpoints.pairing import check_same_tokenizer, check_tokenizer, end_tokens
from jaxft.checkpoints.sentences import (
    SentenceSettings,
    read_sentence_settings,
    write_sentence_settings,
)
from jaxft.checkpoints.sources import source_config
from jaxft.models import CheckpointError

__all__ = [
    "CheckpointError",
    "SentenceSettings",
    "cache_directory",
    "check_gguf",
    "check_push",
    "check_same_tokenizer",
    "check_tokenizer",
    "end_tokens",
    "fetch",
    "hub_id",
    "license_of",
    "load_gguf_adapter",
    "load_model",
    "load_tokenizer",
    "model_card",
    "model_shapes",
    "open_model",
    "push",
    "read_sentence_settings",
    "resolve",
    "save_checked_gguf_adapter",
    "save_gguf",
    "save_gguf_adapter",
    "save_merged",
    "save_merged_gguf",
    "save_model",
    "source_config",
    "write_card",
    "write_sentence_settings",
]
