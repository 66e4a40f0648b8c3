"""Prompts of encoder-decoders: the encoder reads them, and the decoder begins with its own ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.generation.decoding import SamplingConfig
from jaxft.generation.padding import MIN_BUCKET, bucket, check_ids
from jaxft.models import EncoderDecoder, EncoderDecoderConfig

Prompts = Sequence[Sequence[int]]


def with_source(
    model: Any, prompts: Prompts, columns: Mapping[str, Any] | None, config: SamplingConfig
) -> tuple[Prompts, Mapping[str, Any], SamplingConfig]:
    """(prompts, columns, config) of `generate` in which the prompts of an EncoderDecoder are its source.

    The rules get those of the model's files (`with_rules`). Other models, and calls with a column `source` of
    tokens, are returned unchanged; a model that hears takes its features there.

    Raises:
        ValueError: see `split_prompts`; for a row of the column `source_mask` without a token; or for a model
            that reads sound without the column `source`.
    """
    columns = dict(columns or {})
    if not isinstance(model, EncoderDecoder):
        return prompts, columns, config
    if "source" in columns:
        _check_sources(columns)
        return prompts, columns, with_rules(model.config, config) if model.config.mel else config
    if model.config.mel:
        raise ValueError(
            f'generate: {model.config.family} reads sound: give its features as columns={{"source": [B, '
            f"frames, {model.config.mel}]}}, or call generation.transcribe."
        )
    begin, own = split_prompts(model.config, prompts)
    return begin, columns | own, with_rules(model.config, config)


def with_rules(model_config: EncoderDecoderConfig, config: SamplingConfig) -> SamplingConfig:
    """The rules, with those of the model's files.

    These are `bad_words_ids`, `suppress_tokens`, `begin_suppress_tokens` and `forced_eos_token_id`.
    """
    words = tuple(dict.fromkeys((*config.bad_words, *model_config.banned)))
    end = model_config.last if config.forced_end is None else config.forced_end
    begins = tuple(dict.fromkeys((*config.bad_first, *model_config.banned_first)))
    return dataclasses.replace(config, bad_words=words, bad_first=begins, forced_end=end)


def without_media(model: Any, config: SamplingConfig) -> SamplingConfig:
    """The rules, by which the tokens of images and audio of a model that reads them are never sampled.

    A later forward finds no embedding for such a token in an answer, and is NaN.
    """
    towers = getattr(model.config, "towers", ())
    new = {(tower.token,) for tower in towers}.difference(config.bad_words)
    return dataclasses.replace(config, bad_words=(*config.bad_words, *new)) if new else config


def split_prompts(
    config: EncoderDecoderConfig, prompts: Prompts
) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """(prompts of the decoder, columns `source` and `source_mask`) of sources.

    Raises:
        ValueError: for an empty source, or one longer than the positions, or ids without a row; or if no
            file names the id that begins a text.
    """
    begin, longest = decoder_begin(config), max(map(len, prompts), default=0)
    if not prompts or not min(map(len, prompts)):
        raise ValueError("generate: every prompt needs at least one token.")
    if longest > config.max_length:
        raise ValueError(
            f"generate: a source of {longest} tokens exceeds the model's {config.max_length} positions; "
            "shorten it."
        )
    check_ids(prompts, config.vocab_size)
    width = min(bucket(longest, MIN_BUCKET), config.max_length)
    source = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(source.shape, np.int32)
    for i, prompt in enumerate(prompts):
        source[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
    return [begin] * len(prompts), {"source": source, "source_mask": mask}


def decoder_begin(config: Any) -> list[int]:
    """The ids with which the decoder's text begins.

    Raises:
        ValueError: if neither generation_config.json nor config.json names the first one.
    """
    start = config.decoder_start
    if start is None:
        raise ValueError(
            f"{config.family}: neither generation_config.json nor config.json has a decoder_start_token_id, "
            "the id that begins an answer (for mBART that of the target language); add it."
        )
    return [start] if config.first is None else [start, config.first]


def _check_sources(columns):
    """Raises for a source without tokens, of which attention would make numbers of nothing."""
    empty = np.flatnonzero(~np.any(np.asarray(columns.get("source_mask", [[1]])) > 0, axis=-1))
    if np.shape(columns["source"])[-1] == 0 or len(empty):
        raise ValueError(
            f"generate: the sources of rows {empty[:5].tolist() or 'all'} have no token (source_mask is 0 "
            "everywhere); leave these rows out."
        )


def needed_positions(model: Any, prompt: int, new: int) -> int:
    """Positions that a prompt and an answer of so many tokens need, of which a model has `max_length`."""
    if not isinstance(model, EncoderDecoder):
        return prompt + new
    return max(prompt, new + len(decoder_begin(model.config)))
