"""Names of tensors, checks and targets that models with a part for images or sounds share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from jaxft.models.errors import CheckpointError
from jaxft.models.names import Entry
from jaxft.models.transformer import TRANSFORMER_TARGETS, Targets


def part_targets(name: str, linear: str) -> Targets:
    """The targets "language" and `name`, whose linear layers are those paths; together they are all."""
    language = TRANSFORMER_TARGETS.linear
    return TRANSFORMER_TARGETS._replace(
        linear=f"(?:{language}|{linear})", parts=(("language", language), (name, linear))
    )


def check_token(key: str, token: int, vocab_size: int) -> None:
    """Raises CheckpointError if `token`, in config.json under `key`, is not in the vocabulary."""
    if not 0 <= token < vocab_size:
        raise CheckpointError(
            f"config.json: {key} is {token}, expected one of the {vocab_size} ids of the vocabulary."
        )


def text_entries(entries: Iterable[Entry], name: str = "language_model") -> list[Entry]:
    """The entries of a text model whose tensors are those of the part `name`."""
    return [
        dataclasses.replace(entry, name=entry.name.replace("model.", f"model.{name}.", 1))
        for entry in entries
    ]


def renamed(earlier: Mapping[str, str]) -> Callable[[str], str]:
    """The present name of a tensor under its own or an earlier one, of which `earlier` has the beginnings."""

    def rename(name: str) -> str:
        name = name.removeprefix("model.")
        for theirs, ours in earlier.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"

    return rename
