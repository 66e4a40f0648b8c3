"""Texts from speech: the first ids and the rules of Whisper's files, around the sampler and beam search."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation.beam import Beams, Hypotheses, beam_search
from jaxft.generation.decoding import SamplingConfig
from jaxft.generation.sampler import Generation, generate
from jaxft.models import EncoderDecoder, languages, speech_begin
from jaxft.parallel import to_host

Params = Any


def transcribe(
    model: EncoderDecoder,
    params: Params,
    features: Any,
    key: jax.Array,
    config: SamplingConfig = SamplingConfig(temperature=0.0),  # noqa: B008 (frozen)
    *,
    language: str | None = None,
    task: str | None = None,
    beams: Beams | None = None,
    **options: Any,
) -> Generation | Hypotheses:
    """The texts of clips, one row each, without the ids with which every text of the model begins.

    The rules of generation_config.json are followed: `suppress_tokens`, `begin_suppress_tokens`,
    `bad_words_ids`. Without timestamps; a clip is one window of the model.

    Args:
        model: of the family `whisper`.
        features: [clips, frames, mel], of `jaxft.data.LogMel`.
        key: see `generate`; greedy decoding and beams draw nothing.
        config: its stop_ids default to the ids that end a text by the model's files.
        language: a code such as "de"; None: the files' language or, if they name none, detected per clip.
        task: "transcribe" or "translate" (into English); None: the task of the files.
        beams: searches beams instead of sampling.
        options: further arguments of `generate` or `beam_search`.

    Raises:
        ValueError: for a language or task that the model's files do not list, no clips, or a text that
            exceeds the positions.
    """
    if not np.shape(features)[0]:
        raise ValueError("transcribe: there are no clips.")
    begins = first_ids(model, params, features, language, task)
    if not config.stop_ids:
        config = dataclasses.replace(config, stop_ids=model.config.special.ends)
    columns = {"source": features}
    if beams is not None:
        return beam_search(model, params, begins, beams, config, columns=columns, **options)
    return generate(model, params, begins, key, config, columns=columns, **options)


def first_ids(
    model: EncoderDecoder,
    params: Params,
    features: Any,
    language: str | None = None,
    task: str | None = None,
) -> list[list[int]]:
    """The ids with which the text of each clip begins; the language is detected if nothing names it.

    Args and errors: see `transcribe`.
    """
    begin = speech_begin(model.config, language, task)
    if None not in begin:
        return [begin] * len(features)
    found = detect_language(model, params, features)
    return [[int(i) if j is None else j for j in begin] for i in found]


def detect_language(model: EncoderDecoder, params: Params, features: Any) -> np.ndarray:
    """[clips]: the id of the likeliest language after `decoder_start_token_id`."""
    known = np.array(sorted(languages(model.config).values()))
    scores = to_host(_first_logits(model, params, jnp.asarray(features)))
    return known[scores[:, known].argmax(-1)]


@functools.partial(jax.jit, static_argnames=("model",))
def _first_logits(model, params, features):
    tokens = jnp.full((features.shape[0], 1), model.config.decoder_start, jnp.int32)
    return model.forward(params, {"tokens": tokens, "source": features}).logits[:, -1]
