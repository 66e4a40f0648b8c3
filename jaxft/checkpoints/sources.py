"""Finds out whether a model reads a source sentence, before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jaxft.checkpoints.beside import read_special, with_special
from jaxft.checkpoints.contents import read_config
from jaxft.checkpoints.models import resolve
from jaxft.models import FAMILIES, EncoderDecoderConfig, Family


def source_config(
    path_or_id: str | os.PathLike, families: Sequence[Family] = FAMILIES
) -> EncoderDecoderConfig | None:
    """The config of an encoder-decoder's directory; None for any other model.

    Raises:
        CheckpointError: see load_model.
    """
    if path_or_id == "tiny" or (path := resolve(path_or_id)).suffix == ".gguf":
        return None
    if not (path / "config.json").exists():  # a directory with only a tokenizer
        return None
    json = read_config(path)
    named = [family for family in families if family.name == json.get("model_type")]
    if not named or named[0].huggingface.task_type != "SEQ_2_SEQ_LM":
        return None
    codec = named[0].huggingface
    return with_special(codec.config(json), read_special(path, json, codec.special))
