"""Beam search: the completions of the highest score that a search of fixed width finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation.decoding import SamplingConfig, process_logits
from jaxft.generation.sampler import (
    CHUNK,
    Params,
    begin,
    inputs_of,
    next_token,
    repeat_rows,
    separate,
    written,
)
from jaxft.generation.sources import with_source, without_media
from jaxft.kernels.largest import largest
from jaxft.models import Decoder, take_rows
from jaxft.parallel import in_turn, to_host


@dataclasses.dataclass(frozen=True)
class Beams:
    """Settings of beam search, with the meaning that they have in transformers' `generate`.

    Attributes:
        num_beams: unfinished completions of a prompt that are continued at each step. 1 is greedy decoding.
        length_penalty: p of the score Σ log p(token) / length^p of a completion, end token included. Above 0
            it favours long completions, below 0 short ones.
        early_stopping: when the search of a prompt ends, once it has `num_beams` completions. True: at once.
            False: when the likeliest unfinished completion, at its present length, scores no better than the
            worst of them. "never": when it could not score better at any length, which for p > 0 is
            estimated at `max_new_tokens`.
        num_return_sequences: completions returned for each prompt, the best first; at most `num_beams`.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self):
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}.")
        if not abs(self.length_penalty) < float("inf"):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}.")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}.'
            )
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"num_return_sequences must lie in 1..num_beams, got {self.num_return_sequences} with "
                f"num_beams={self.num_beams}."
            )
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping is not False):
            raise ValueError(
                f"length_penalty={self.length_penalty} and early_stopping={self.early_stopping!r} have no "
                "effect with num_beams=1, which is greedy decoding; set num_beams above 1, or neither."
            )


class Hypotheses(NamedTuple):
    """Completions as numpy arrays, `num_return_sequences` rows for each prompt, the best first."""

    tokens: np.ndarray  # [B, N] int32, 0 after the end
    mask: np.ndarray  # [B, N] bool, True on the tokens of the completion, including the stop token
    # [B] Σ log p / length^length_penalty in nats, of log-probs after the rules; -inf: there is none
    scores: np.ndarray
    finish: list[str]  # "stop", "length", or "none" if fewer completions exist than were asked for

    @property
    def completions(self) -> list[list[int]]:
        """The generated ids of each row, stop token included."""
        return [row[m].tolist() for row, m in zip(self.tokens, self.mask, strict=True)]


class _Search(NamedTuple):
    """State of the search: B prompts of K beams, whose rows are adjacent, and room for N tokens."""

    cache: Any
    logits: jax.Array  # [B K, V] for the next token
    position: jax.Array  # [B K]
    history: jax.Array | None  # [B K, slots]
    step: jax.Array  # [] tokens of each beam
    tokens: jax.Array  # [B, K, N]
    sums: jax.Array  # [B, K] Σ log p of each beam, descending; -inf: there is none
    found: jax.Array  # [B, K, N] the best completions so far
    lengths: jax.Array  # [B, K] their tokens
    scores: jax.Array  # [B, K] their scores, descending; -inf: there is none
    active: jax.Array  # [B] whether the search of the prompt continues


class _Settings(NamedTuple):
    """Settings that are values of the program, so that another value needs no other program."""

    limit: jax.Array  # [] max_new_tokens
    least: jax.Array  # [] min_new_tokens
    penalty: jax.Array  # [] float32, length_penalty
    early: jax.Array  # [] bool, early_stopping is True
    never: jax.Array  # [] bool, early_stopping is "never"
    forced: (
        jax.Array
    )  # [] tokens that the model itself puts before an answer, which count in its length


def beam_search(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    beams: Beams,
    config: SamplingConfig = SamplingConfig(temperature=0.0),  # noqa: B008 (frozen)
    *,
    columns: Mapping[str, Any] | None = None,
    cache_dtype: Any = None,
) -> Hypotheses:
    """Finds completions of high Σ log p / length^length_penalty, as transformers' `generate(num_beams=...)`.

    At each step the (1 + number of stop ids) x num_beams likeliest continuations of all beams are
    considered, at least 2 x num_beams: those among the first num_beams that end are completions, and the
    first num_beams that do not end are the next beams. Rules of `config` that depend on tokens change
    log-probs, which are not normalised again, in the order of sampling, where they change logits. The search
    of a prompt depends neither on its padding nor on other prompts.

    Args:
        model, params, prompts, columns, cache_dtype: as for `generate`. The arrays of a cache have rows on
            their first axis, or its class has a method `take_rows` (`jaxft.models.take_rows`).
        config: max_new_tokens, min_new_tokens, stop_ids and the rules that hold for greedy decoding; its
            temperature must be 0.

    Raises:
        ValueError: for an empty prompt, prompts and completions beyond the model's max_length, a temperature
            other than 0, or stop_strings.
    """
    if config.temperature != 0:
        raise ValueError(
            f"beam_search: temperature={config.temperature} samples, but beam search keeps the likeliest "
            "tokens; set temperature=0."
        )
    if config.stop_strings:
        raise ValueError(
            f"beam_search: stop_strings={config.stop_strings} are searched for in text, but beam search ends "
            "completions only at token ids; use stop_ids."
        )
    given = prompts
    prompts, columns, config = with_source(model, given, columns, without_media(model, config))
    forced = 0 if prompts is given else len(prompts[0]) - 1  # behind the decoder's start
    room = -(-config.max_new_tokens // CHUNK) * CHUNK
    state, shared = begin(model, params, prompts, config, room, columns, cache_dtype)
    settings = _Settings(
        jnp.asarray(config.max_new_tokens, jnp.int32),
        jnp.asarray(config.min_new_tokens, jnp.int32),
        jnp.asarray(beams.length_penalty, jnp.float32),
        # Without alternatives the first end token ends the completion, whatever would score better.
        jnp.asarray(beams.early_stopping is True or beams.num_beams == 1),
        jnp.asarray(beams.early_stopping == "never"),
        jnp.asarray(forced, jnp.int32),
    )
    rules = dataclasses.replace(config, max_new_tokens=1, min_new_tokens=0)
    found = _search(model, params, in_turn(state), settings, rules, beams.num_beams, room, shared)
    kept = [x[: len(prompts), : beams.num_return_sequences] for x in to_host(found)]
    tokens, lengths, scores = (x.reshape(-1, *x.shape[2:]) for x in kept)
    tokens = tokens[:, : config.max_new_tokens]
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    last = tokens[np.arange(len(tokens)), np.maximum(lengths - 1, 0)]
    stops = np.isin(last, config.stop_ids)
    finish = np.where(lengths == 0, "none", np.where(stops, "stop", "length")).tolist()
    return Hypotheses(np.where(mask, tokens, 0), mask, scores, finish)


@functools.partial(jax.jit, static_argnames=("model", "config", "beams", "room", "shared"))
def _search(model, params, state, settings, config, beams, room, shared):
    """(tokens [B, K, N], lengths [B, K], scores [B, K]) of the completions, the best first."""
    params = separate(model, params)
    batch = state.done.shape[0]
    rows = repeat_rows(state._replace(keys=None), beams)
    blank = jnp.zeros((batch, beams, room), jnp.int32)
    none = jnp.full((batch, beams), -jnp.inf)
    search = _Search(
        cache=rows.cache,
        logits=rows.logits,
        position=rows.position,
        history=rows.history,
        step=jnp.zeros((), jnp.int32),
        tokens=blank,
        sums=none.at[:, 0].set(0.0),  # the beams of a prompt are all the same at first
        found=blank,
        lengths=jnp.zeros((batch, beams), jnp.int32),
        scores=none,
        active=~state.done,
    )

    def body(search):
        search, parents = _choose(search, settings, config)
        return _advance(model, params, search, parents, shared)

    going = lambda search: (search.step < settings.limit) & jnp.any(search.active)
    search = jax.lax.while_loop(going, body, search)
    return search.found, search.lengths, search.scores


def _choose(search, settings, config):
    """Ends and continues beams: (the search with their next tokens, parents [B, K] of the beams)."""
    batch, beams, _ = search.tokens.shape
    logits, length = search.logits, search.step + 1
    at = search.step < settings.least, length == settings.limit, search.step == 0
    rules = lambda table: process_logits(table, config, search.history, search.position, *at)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A repetition penalty differs between logits, on which greedy decoding applies it, and log-probs.
    log_probs = rules(logits) - normaliser if beams == 1 else rules(logits - normaliser)
    size = log_probs.shape[-1]
    sums = log_probs.reshape(batch, beams, size) + search.sums[:, :, None]
    count = min(max(2, 1 + len(config.stop_ids)), size) * beams
    sums, index = largest(sums.reshape(batch, beams * size), count)
    parents, token = index // size, index % size
    tokens = jnp.take_along_axis(search.tokens, parents[..., None], axis=1)
    put = jax.lax.dynamic_update_slice_in_dim
    tokens = put(tokens, token[..., None], search.step, axis=2)  # [B, candidates, N]
    stops = jnp.asarray(config.stop_ids or (-1,))
    ends = jnp.any(token[..., None] == stops[None, None], axis=-1)
    ends = ends | (length == settings.limit)

    # Completions: candidates after the first K are there only to be continued.
    counted = length + settings.forced
    score = sums[:, :beams] / counted**settings.penalty
    score = jnp.where(ends[:, :beams] & search.active[:, None], score, -jnp.inf)
    scores, best = jax.lax.top_k(jnp.concatenate([search.scores, score], axis=1), beams)
    lengths = jnp.where(score > -jnp.inf, length, 0)
    lengths = jnp.concatenate([search.lengths, lengths], axis=1)
    found = jnp.concatenate([search.found, tokens[:, :beams]], axis=1)
    # Beams.
    sums, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), beams)
    worst, likeliest = scores[:, -1], sums[:, 0]
    furthest = settings.never & (settings.penalty > 0)
    horizon = jnp.where(furthest, settings.limit + settings.forced, counted)
    better = likeliest / horizon**settings.penalty > worst
    full = settings.early & (worst > -jnp.inf)
    search = search._replace(
        step=length,
        tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
        sums=sums,
        found=jnp.take_along_axis(found, best[..., None], axis=1),
        lengths=jnp.take_along_axis(lengths, best, axis=1),
        scores=scores,
        active=search.active & better & ~full,
    )
    return search, jnp.take_along_axis(parents, kept, axis=1)


def _advance(model, params, search, parents, shared):
    """The search after a forward pass of each beam's last token; beam k continues beam parents[:, k]."""
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    token = jax.lax.dynamic_slice_in_dim(search.tokens, search.step - 1, 1, axis=2)
    token, there = token.reshape(-1, 1), jnp.ones((batch * beams, 1), bool)
    history = search.history
    if history is not None:
        history = written(history[rows], token, there, search.position)
    # The beams of a prompt have one length, so that positions need not be gathered.
    cache = search.cache if beams == 1 else take_rows(search.cache, rows, shared)
    inputs = inputs_of(token, search.position[:, None], there)
    found = next_token(model, params, inputs, cache)
    return search._replace(
        cache=found.cache,
        logits=found.logits,
        position=search.position + 1,
        history=history,
    )
