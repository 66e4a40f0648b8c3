"""The files beside the weights of a Hugging Face directory: config.json, generation_config.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxft.checkpoints.pairing import check_tokenizer, end_tokens, named_ends, tokenizer_ends
from jaxft.models import CheckpointError, Family
from jaxft.models.json_files import read_json
from jaxft.models.special_ids import (
    SpecialIds,
    read_special_ids,
    with_ends,
    write_generation,
    write_ids,
)

GENERATION = "generation_config.json"


class _Named(NamedTuple):
    """The part of a model's config that does not depend on its architecture."""

    vocab_size: int
    special: SpecialIds


def read_special(path: pathlib.Path, config: dict[str, Any], default: SpecialIds) -> SpecialIds:
    """The special ids of a directory, whose config.json is `config`; see read_special_ids."""
    file = path / GENERATION
    try:
        return read_special_ids(config, read_json(file) if file.exists() else {}, default)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def with_special(config: Any, special: SpecialIds) -> Any:
    """The config with the ids, if it has a field for them."""
    return dataclasses.replace(config, special=special) if hasattr(config, "special") else config


def check_beside(tokenizer: Any, path: pathlib.Path, families: Sequence[Family]) -> None:
    """Checks that a directory's tokenizer matches its config.json, if it has one.

    A tokenizer without an EOS gets the first one that the files name.

    Raises:
        CheckpointError: see end_tokens, for decoders; see check_tokenizer, for others.
    """
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    known = [family for family in families if family.name == config.get("model_type")]
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not known or not size:
        return
    codec = known[0].huggingface
    named = _Named(size, read_special(path, config, codec.special))
    decodes = codec.task_type in (
        "CAUSAL_LM",
        "SEQ_2_SEQ_LM",
    ) and "ForSequenceClassification" not in str(config.get("architectures"))
    try:
        end_tokens(tokenizer, named) if decodes else check_tokenizer(tokenizer, named)
        if tokenizer.eos_token is None and (ends := named_ends(named.special)):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_beside(
    path: pathlib.Path, config: dict[str, Any], special: SpecialIds | None, tokenizer: Any = None
) -> None:
    """Writes config.json with the special ids, and generation_config.json if any id or setting is known.

    Args:
        path: the directory.
        config: config.json without those ids.
        special: the model's ids; None for a model without any, such as an encoder.
        tokenizer: its ids that end a text are written too.
    """
    if special is None:
        _write(path / "config.json", config)
        return
    if tokenizer is not None:
        if special == SpecialIds():
            special = SpecialIds(bos=tokenizer.bos_token_id, pad=tokenizer.pad_token_id)
        special = with_ends(special, tokenizer_ends(tokenizer))
    _write(path / "config.json", config | write_ids(special))
    # Otherwise transformers would follow a file of an earlier model in this directory.
    (path / GENERATION).unlink(missing_ok=True)
    if settings := write_generation(special):
        _write(path / GENERATION, settings)


def _write(file, settings):
    file.write_text(json.dumps(settings, indent=2) + "\n")
