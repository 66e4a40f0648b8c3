"""Answers that a model is forced to give after a prefix of its own answer, and their chance of being right.

The meta-prover of MRT (Qu et al., 2025, arxiv.org/abs/2503.07572) is the policy itself: forced tokens, such
as "time is up" and the end of the thinking block, follow a prefix, and the model must answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import losses
from jaxft.generation import SamplingConfig, generate, prefill
from jaxft.generation.sampler import separate
from jaxft.keys import stream
from jaxft.models import Decoder, virtual_tokens
from jaxft.rl.prompts import Asked
from jaxft.rl.rollouts import (
    Batch,
    Sample,
    check_no_columns,
    check_policy,
    checked,
    interleaved,
)
from jaxft.rl.transforms import Transform

Ends = Callable[[Batch], np.ndarray]  # batch -> [B, K + 1], see jaxft.rl.progress.separator_ends
# (batch, ends, params, key) -> chance of a right answer at each end [B, K + 1], NaN where there is none
Chances = Callable[[Batch, np.ndarray, Any, jax.Array], Any]


def add_chances(ends: Ends, chances: Chances) -> Transform:
    """Adds `episode_ends` and `answer_chances`, [B, K + 1] each: J at each prefix of each response.

    Args:
        ends: function that finds the prefixes, such as a partial of `separator_ends`.
        chances: `exact_chances` or `sampled_chances`.

    Raises:
        ValueError: when called, if a prefix is longer than its response.
    """

    def add(batch, params, key):
        found = check_ends(ends(batch), batch["completion_mask"])
        return batch | {
            "episode_ends": found,
            "answer_chances": np.asarray(chances(batch, found, params, key)),
        }

    return add


def check_ends(ends: Any, mask: Any) -> np.ndarray:
    """Returns the ends [B, K + 1] as an array; raises ValueError if one lies outside of its response."""
    ends, lengths = np.asarray(ends), np.asarray(mask).sum(axis=1)
    beyond = (ends > lengths[:, None]).any(axis=1)
    if beyond.any():
        row = int(np.flatnonzero(beyond)[0])
        raise ValueError(
            f"add_chances: response {row} has {lengths[row]} tokens, but a prefix ends at token "
            f"{ends[row].max()}; prefixes must lie within the response."
        )
    return ends


def exact_chances(model: Decoder, forced: Sequence[int], column: str = "gold") -> Chances:
    """Returns chances computed from the likelihood of the only right answer: no sampling noise.

    Args:
        model: a Decoder.
        forced: tokens that force an answer.
        column: entry of the batch, [B, A], with the right answer's tokens, its stop token included; -1 behind
            them.

    Raises:
        ValueError: if nothing is forced, or for a model with Gated DeltaNets, whose states hold all tokens.
    """
    if not jax.eval_shape(functools.partial(model.init_cache, 1, 1)).rewinds:
        raise ValueError(
            "exact_chances: later tokens cannot be hidden from the states of Gated DeltaNets; use "
            "sampled_chances."
        )
    if not len(forced):
        raise ValueError(
            "exact_chances: forced must have at least one token, after which the answer stands."
        )
    forced = jnp.asarray(forced, jnp.int32)

    def chances(batch, ends, params, key):
        check_no_columns(_media_of(model, batch), "exact_chances")
        names = ("tokens", "segment_ids", "completion_mask", column)
        given = [jnp.asarray(batch[name]) for name in names]
        found = forced_log_probs(model, params, *given, jnp.asarray(ends), forced)
        return jnp.where(jnp.asarray(ends) >= 0, jnp.exp(found), jnp.nan)

    return chances


@functools.partial(jax.jit, static_argnames=("model",))
def forced_log_probs(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array,
    completion_mask: jax.Array,
    gold: jax.Array,
    ends: jax.Array,
    forced: jax.Array,
) -> jax.Array:
    """log π(gold | prompt, prefix, forced) [B, K + 1] in nats, at temperature 1; ignore those at ends of -1.

    The keys and values of a row are computed once; for each prefix, the later slots of the cache are hidden
    and only the forced tokens and the answer are computed.

    Args:
        tokens, segment_ids: [B, T], prompt and response.
        completion_mask: [B, N], the policy's tokens in the last N columns.
        gold: [B, A], -1 behind the answer.
        ends: [B, K + 1], tokens of the response in each prefix.
        forced: [F].
    """
    rows, width = tokens.shape[0], tokens.shape[1] - completion_mask.shape[1]
    given = jnp.concatenate(
        [jnp.tile(forced[None], (rows, 1)), jnp.maximum(gold, 0)[:, :-1]], axis=1
    )
    count = forced.shape[0]
    seen = segment_ids > 0
    slots = tokens.shape[1] + given.shape[1]
    cache = prefill(model, params, tokens, seen, None, slots).cache
    lead, separated = virtual_tokens(params) + width, separate(model, params)

    def at(end):
        valid = cache.valid & (jnp.arange(cache.length)[None] < lead + end[:, None])
        # Virtual tokens have positions too; `positions` of a batch do not count them.
        start = jnp.sum(valid, axis=1, keepdims=True) - virtual_tokens(params)
        inputs = {
            "tokens": given,
            "positions": start + jnp.arange(given.shape[1])[None],
            "segment_ids": jnp.ones(given.shape, jnp.int32),
        }
        held = dataclasses.replace(cache, valid=valid)
        found = model.forward(separated, inputs, cache=held).at(slice(None), slice(count - 1, None))
        log_probs = losses.linear_log_probs(
            found.hidden, found.head, jnp.maximum(gold, 0), softcap=found.softcap
        )
        return jnp.sum(jnp.where(gold >= 0, log_probs, 0.0), axis=1)

    # One prefix at a time: all at once would copy the cache for each.
    return jax.lax.map(at, jnp.maximum(ends, 0).T).T


def sampled_chances(
    model: Decoder,
    judge: Callable[[Sequence[Sequence[int]], np.ndarray, Batch], Any],
    forced: Sequence[int],
    config: SamplingConfig,
    branches: int,
    *,
    sampler: Callable[..., Any] = generate,
) -> Chances:
    """Returns chances estimated from `branches` sampled answers after each prefix.

    Args:
        model: a Decoder.
        judge: (completions, row of the batch for each, batch) -> [answers], 1 for a right one; without a
            verdict (NaN) it counts as wrong.
        forced: tokens that force an answer.
        config: the sampling config of the answers.
        branches: answers per prefix; the authors' online form has 4.
        sampler: a function with the signature of `generate`.

    Raises:
        ValueError: if branches is below 1, or for greedy sampling.
    """
    if branches < 1:
        raise ValueError(f"sampled_chances: branches must be at least 1, got {branches}.")
    check_policy(config)

    def chances(batch, ends, params, key):
        check_no_columns(_media_of(model, batch), "sampled_chances")
        rows, places = np.nonzero(ends >= 0)
        prefixes = prefixes_of(batch, rows, ends[rows, places])
        answers = forced_answers(
            functools.partial(sampler, model, params), prefixes, forced, branches, key, config
        )
        verdicts = judge(answers, np.repeat(rows, branches), batch)
        found = np.full(ends.shape, np.nan, np.float32)
        right = np.nan_to_num(np.asarray(verdicts, np.float32)).reshape(-1, branches)
        found[rows, places] = right.mean(axis=1)
        return found

    return chances


def _media_of(model, batch):
    """The columns of images and clips of a batch that the model reads."""
    towers = getattr(model.config, "towers", ())
    return {name for tower in towers for name in tower.columns} & batch.keys()


def prefixes_of(batch: Batch, rows: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    """Token ids of prefixes: for each row of the batch, its prompt and `end` tokens of its response."""
    tokens, seen = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"]) > 0
    width = tokens.shape[1] - np.asarray(batch["completion_mask"]).shape[1]
    cut = lambda row, end: tokens[row, : width + end][seen[row, : width + end]].tolist()
    return [cut(row, end) for row, end in zip(rows, ends, strict=True)]


def forced_answers(
    sample: Callable[..., Any],
    prefixes: Sequence[Sequence[int]],
    forced: Sequence[int],
    count: int,
    key: jax.Array,
    config: SamplingConfig,
) -> list[list[int]]:
    """Samples `count` adjacent answers after each prefix and the forced tokens.

    `sample` is `generate` without its first two arguments.
    """
    prompts = [[*prefix, *forced] for prefix in prefixes]
    return sample(prompts, key, config, samples=count).completions


def with_terminations(sample: Sample, forced: Sequence[int]) -> Sample:
    """Samples groups of both kinds: the first half continues a prefix, the second half must answer at once.

    The prompts are questions with a prefix of an answer. The batch has `terminated` [B]; the forced tokens
    belong to the prompt, so that they, like the prefix, get no gradient. Rewards judge both halves.

    Args:
        sample: `answers`, or another sampler, with half the group size.
        forced: tokens that force an answer.
    """

    def both(params, asked: Asked, key):
        # Both halves get the same width, of which the forced tokens are a part.
        width = None if asked.width is None else asked.width + len(forced)
        stopped = [[*ids, *forced] for ids in asked.ids]
        going = checked(sample(params, asked._replace(width=width), key))
        other = asked._replace(ids=stopped, width=width)
        ended = checked(sample(params, other, stream(key, "terminated")))
        batch, second = interleaved(going, ended, len(asked.ids), asked.columns)
        return batch | {"terminated": second}

    return both
