"""The ids with which the texts of a model that hears begin, as its generation_config.json names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.models.encoder_decoder_config import EncoderDecoderConfig


def speech_begin(
    config: EncoderDecoderConfig, language: str | None = None, task: str | None = None
) -> list[int | None]:
    """The ids with which a text begins, as in transformers; None stands for that of a language to detect.

    They are `decoder_start_token_id`, and then the ids of language and task if the model knows several,
    and that of texts without timestamps. `language` and `task` precede those of generation_config.json,
    and these precede `forced_decoder_ids`.

    Raises:
        ValueError: for a language or task that the files do not list, or files without a first id.
    """
    settings = _settings(config)
    if config.decoder_start is None:
        raise ValueError(
            f"{config.family}: neither generation_config.json nor config.json has a decoder_start_token_id, "
            "the id that begins a text; add it."
        )
    language, task = language or settings.get("language"), task or settings.get("task")
    begin: list[int | None] = [config.decoder_start]
    if language is None and task is None:
        begin += _forced(config, settings)
    undefined = len(begin) == 1 or begin[1] is None
    if language is not None:
        begin[1:2] = [_listed(settings, "lang_to_id", language, _language)]
    elif undefined:
        begin[1:2] = [None] if settings.get("lang_to_id") else []
    tasks = settings.get("task_to_id") or {}
    if task is not None:
        number = _listed(settings, "task_to_id", task, str)
        begin = [*(i for i in begin if i not in tasks.values()), number]
    elif language is not None and tasks and not set(begin) & set(tasks.values()):
        begin.append(tasks["transcribe"])
    plain = settings.get("no_timestamps_token_id")
    return begin if plain in (None, begin[-1]) else [*begin, plain]


def languages(config: EncoderDecoderConfig) -> dict[str, int]:
    """The ids of the languages by their tokens, such as "<|en|>"; {}: the model knows one."""
    return dict(_settings(config).get("lang_to_id") or {})


def _settings(config) -> Mapping[str, Any]:
    return json.loads(config.special.generation or "{}")


def _forced(config, settings) -> list[int | None]:
    """The ids of `forced_decoder_ids`, pairs of a place and an id or null, from place 1 on."""
    pairs: Sequence = settings.get("forced_decoder_ids") or ()
    pairs = pairs or json.loads(config.source or "{}").get("forced_decoder_ids") or ()
    if [place for place, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise ValueError(
            f"{config.family}: forced_decoder_ids is {list(pairs)}, expected an entry for each of the places "
            "1, 2...; correct generation_config.json."
        )
    return [i for _, i in pairs]


def _listed(settings, table: str, name: str, spelled: Callable[[str], str]) -> int:
    known = settings.get(table) or {}
    if spelled(name) not in known:
        names = ", ".join(sorted(known)) or "none: the model knows one language and task"
        what = "language" if table == "lang_to_id" else "task"
        raise ValueError(
            f"{what} {name!r} is not in {table} of generation_config.json, which lists {names}; leave "
            "it out, or choose one of these."
        )
    return known[spelled(name)]


def _language(name):
    return name if name.startswith("<|") else f"<|{name.lower()}|>"
