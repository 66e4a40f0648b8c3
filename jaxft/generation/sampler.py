"""The KV-cache sampler: prefill once, then decode token by token inside one compiled loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation.decoding import SamplingConfig, process_logits, transform_logits
from jaxft.generation.padding import left_pad, padded
from jaxft.generation.requests import after_string, check_request, row_keys, sample_keys
from jaxft.generation.sources import with_source, without_media
from jaxft.models import Cache, Decoder, layers_of, unstack_layers, virtual_tokens
from jaxft.parallel import in_turn, to_host

CHUNK = 64  # tokens decoded between two inspections by the host; cache sizes are rounded to it

Params = Any


class State(NamedTuple):
    """State of a batch during generation."""

    cache: Cache
    logits: jax.Array  # [B, V] float32, for the next token
    position: jax.Array  # [B] int32, position of the next token
    done: jax.Array  # [B] bool
    keys: jax.Array | None  # [B] one key per row; None: nothing is sampled
    step: jax.Array  # [B] int32, tokens decoded so far
    # [B, slots] int32, the token at each position; only for rules that need past tokens (`remember`)
    history: jax.Array | None = None


class Part(NamedTuple):
    """Results of one chunk of decoding, [B, steps] each."""

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    sampler_log_probs: jax.Array


class Generation(NamedTuple):
    """Completions as numpy arrays, one row per sample of a prompt."""

    tokens: np.ndarray  # [B, N] int32, 0 after the end
    mask: np.ndarray  # [B, N] bool, True on generated tokens, including the stop token
    # [B, N] nats, under the model's full vocabulary at the temperature (1 if greedy), before any rule
    log_probs: np.ndarray
    sampler_log_probs: np.ndarray  # [B, N] nats, under the distribution actually sampled from
    finish: list[str]  # "stop" or "length"

    @property
    def completions(self) -> list[list[int]]:
        """The generated ids of each row, stop token included."""
        return [row[m].tolist() for row, m in zip(self.tokens, self.mask, strict=True)]


def generate(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    *,
    samples: int = 1,
    columns: Mapping[str, Any] | None = None,
    row_ids: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    tokenizer: Any = None,
    cache_dtype: Any = None,
    chunk: int = CHUNK,
) -> Generation:
    """Generates completions of token-id prompts, `samples` adjacent rows for each.

    Prompts are left-padded to a bucket (powers of two and three quarters of them), rows likewise, so
    that few programs are compiled; a row's result does not depend on padding or on the other rows.
    Samples of a prompt share its prefill.

    Args:
        model: a Decoder, or another model with `forward` that takes a cache, `init_cache` and
            `config.max_length`. Stacked layers of jaxft's own models are unstacked first; another
            model's forward gets its params unchanged.
        prompts: token ids, at least one per prompt.
        columns: further inputs of the model's forward (images, a source sentence), name -> [prompts, ...].
            Only the prefill receives them, so the model's cache must keep what later tokens need. An
            EncoderDecoder without a column `source` reads the prompts as that column: see `with_source`.
        key: a jax.random.key. Row i draws from fold_in(key, row_ids[i]) and the token's number.
            With several samples, sample j draws from fold_in of that key and j.
        row_ids: ids of the prompts, default 0, 1, 2...; distinct ids give equal prompts distinct samples.
        limits: the most new tokens of each prompt's answers, at most and by default max_new_tokens.
        tokenizer: required for `stop_strings`.
        cache_dtype: dtype of keys and values; None: that of the model's activations.
        chunk: tokens decoded between two inspections by the host, which happen only if stop_strings are
            set: the program itself ends when all rows are done.

    Raises:
        ValueError: for an empty prompt, or if prompt and completion exceed the model's max_length.
    """
    most = check_request(prompts, config, samples, limits, tokenizer)
    prompts, columns, config = with_source(model, prompts, columns, config)
    chunk, slots = chunks(config, chunk)
    state, most = opened(
        model, params, prompts, key, config, slots, most, samples, columns, row_ids, cache_dtype
    )
    rows = len(prompts) * samples
    return answered(model, params, state, config, most, rows, tokenizer, chunk)[1]


def chunks(config: SamplingConfig, chunk: int = CHUNK) -> tuple[int, int]:
    """Returns the tokens of a chunk, all of them if the host need not look, and those of all chunks."""
    chunk = chunk if config.stop_strings else -(-config.max_new_tokens // CHUNK) * CHUNK
    return chunk, -(-config.max_new_tokens // chunk) * chunk


def opened(
    model, params, prompts, key, config, slots, most, samples, columns, row_ids, cache_dtype=None
) -> tuple[State, np.ndarray]:
    """Returns the state after the prompts, `samples` rows for each, and the most new tokens of its rows.

    Arguments are those of `generate`; `slots` are those for new tokens, `most` [prompts] their largest
    numbers. Rows are padded to a bucket; those that are added may have 0 new tokens.
    """
    state, _ = begin(model, params, prompts, config, slots, columns, cache_dtype)
    rows, size = len(prompts), state.done.shape[0]
    state = state._replace(keys=row_keys(key, rows, row_ids, size))
    most = np.repeat(np.pad(most, (0, size - rows)), samples)
    return in_turn(fork(in_turn(state), samples)), most


def answered(
    model, params, state, config, most, rows, tokenizer, chunk
) -> tuple[State, Generation]:
    """Returns the state after the answers, and those of the first `rows` rows.

    Tokens behind a stop string, which the host finds late, are in the state but not in the answers.
    """
    if config.stop_strings:
        state, part, done = _until_strings(model, params, state, config, chunk, most, tokenizer)
    else:
        state, part = decode(model, params, state, config, chunk, most)
        part, done = to_host((part, state.done))
    return state, _gather(part, done, rows, config.max_new_tokens)


def begin(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    slots: int,
    columns: Mapping[str, Any] | None = None,
    cache_dtype: Any = None,
) -> tuple[State, int]:
    """Returns the state after the prompts, without keys, and the slots that they take in the cache.

    Prompts are padded to a bucket of rows, of which the added ones are done, and to a bucket of tokens.

    Args:
        slots: slots for new tokens.

    Raises:
        ValueError: for an empty prompt, or if prompt and completion exceed the model's max_length.
    """
    tokens, valid = left_pad(prompts, model.config)
    check_lengths(model, params, prompts, config)
    rows, virtual = len(prompts), virtual_tokens(params)
    slots += tokens.shape[1]
    columns = {name: padded(name, x, rows, len(tokens)) for name, x in (columns or {}).items()}
    extra, tokens, valid = np.arange(len(tokens)) >= rows, jnp.asarray(tokens), jnp.asarray(valid)
    state = prefill(model, params, tokens, valid, None, slots, cache_dtype, columns)
    if config.looks_back:
        state = remember(state, tokens, valid, slots)
    return state._replace(done=jnp.asarray(extra)), tokens.shape[1] + virtual


def check_lengths(
    model: Decoder, params: Params, prompts: Sequence[Sequence[int]], config: SamplingConfig
) -> None:
    """Raises ValueError if the longest prompt and max_new_tokens exceed the model's max_length."""
    longest = max(map(len, prompts), default=0) + virtual_tokens(params)
    if longest + config.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the "
            f"model's {model.config.max_length}; shorten one of them."
        )


def _until_strings(model, params, state, config, chunk, limits, tokenizer):
    """Decodes (state, Part, done) with stop strings, which the host searches for after each chunk."""
    parts, looks, done = [], [], limits == 0
    ends = np.full(len(done), np.iinfo(np.int32).max)
    for _ in range(-(-config.max_new_tokens // chunk)):
        state, part = decode(model, params, state, config, chunk, limits)
        parts.append(part)
        settled = done
        *look, done = to_host((part.tokens, part.mask, state.done))
        looks.append(look)
        seen = [np.concatenate(columns, axis=1) for columns in zip(*looks, strict=True)]
        for i in np.flatnonzero(~settled):
            ends[i] = _end_column(*(x[i] for x in seen), config, tokenizer) or ends[i]
        done = done | (ends <= seen[0].shape[1])
        if (done | (seen[1].sum(axis=1) >= limits)).all():
            break
        state = state._replace(done=jnp.asarray(done))
    whole = Part(
        *(np.concatenate(columns, axis=1) for columns in zip(*to_host(parts), strict=True))
    )
    mask = whole.mask & (np.arange(whole.mask.shape[1]) < ends[:, None])
    return state, whole._replace(mask=mask), done


def _end_column(tokens, mask, config, tokenizer):
    """Returns the column after the token that completes a row's first stop string, or None."""
    end = after_string(tokens[mask].tolist(), config, tokenizer)
    return None if end is None else int(np.flatnonzero(mask)[end - 1]) + 1


@functools.partial(jax.jit, static_argnames=("model", "slots", "cache_dtype"))
def prefill(
    model: Decoder,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    keys: jax.Array | None,
    slots: int,
    cache_dtype: Any = None,
    columns: Mapping[str, Any] | None = None,
) -> State:
    """Returns the state after the prompts (tokens, valid [B, P]; left-padded), in a cache of `slots`.

    `columns` are further inputs of the model's forward, [B, ...] each. `keys` are one key for each row;
    only sampling needs them.
    """
    params = separate(model, params)
    cache = model.init_cache(tokens.shape[0], slots + virtual_tokens(params), cache_dtype)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    found = next_token(
        model, params, {**(columns or {}), **inputs_of(tokens, positions, valid)}, cache
    )
    return State(
        cache=found.cache,
        logits=found.logits,
        position=positions[:, -1] + 1,
        done=jnp.zeros(tokens.shape[0], bool),
        keys=keys,
        step=jnp.zeros(tokens.shape[0], jnp.int32),
    )


def remember(state: State, tokens: jax.Array, valid: jax.Array, slots: int) -> State:
    """Adds the prompts (tokens, valid [B, P]; as for `prefill`) to the history of the state.

    Rules that need past tokens (`SamplingConfig.looks_back`) read the history; other states have none.
    """
    blank = jnp.full((tokens.shape[0], slots), -1, jnp.int32)
    start = jnp.zeros(tokens.shape[0], jnp.int32)
    return state._replace(history=written(blank, tokens, valid, start))


@jax.jit
def written(history, tokens, valid, position):
    """Writes valid tokens [B, T] into the history, from each row's position on."""
    places = position[:, None] + jnp.cumsum(valid, axis=1) - 1
    places = jnp.where(valid, places, history.shape[1])
    rows = jnp.arange(history.shape[0])[:, None]
    return history.at[rows, places].set(tokens, mode="drop")


@functools.partial(jax.jit, static_argnames=("samples",))
def fork(state: State, samples: int) -> State:
    """Copies each row of the state `samples` times, adjacent, with a separate key for each copy."""
    if samples == 1:
        return state
    # Keys are repeated separately: not every version of repeat accepts an array of keys.
    others = repeat_rows(state._replace(keys=None), samples)
    return others._replace(keys=sample_keys(state.keys, samples))


def repeat_rows(tree: Any, times: int) -> Any:
    """The tree with each row of its arrays `times` times, adjacent; scalars have no rows."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, tree)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def append(
    model: Decoder, params: Params, state: State, tokens: jax.Array, valid: jax.Array
) -> State:
    """Returns the state after given (not sampled) tokens (tokens, valid [B, T]; left-padded).

    They occupy T slots of the cache, padding included: reserve as many more in `prefill`. A row
    without valid tokens does not change; a row that was done continues.
    """
    params = separate(model, params)
    positions = state.position[:, None] + jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    found = next_token(model, params, inputs_of(tokens, positions, valid), state.cache)
    some = jnp.any(valid, axis=1)
    if state.history is not None:
        history = written(state.history, tokens, valid, state.position)
        state = state._replace(history=history)
    return state._replace(
        cache=found.cache,
        logits=jnp.where(some[:, None], found.logits, state.logits),
        position=state.position + jnp.sum(valid, axis=1, dtype=jnp.int32),
        done=state.done & ~some,
    )


@functools.partial(
    jax.jit, static_argnames=("model", "config", "steps"), donate_argnames=("state",)
)
def _decode(model, params, state, limit, least, busy, config, steps):
    params = separate(model, params)
    rows = state.done.shape[0]
    blank = lambda dtype: jnp.zeros((rows, steps), dtype)
    part = Part(blank(jnp.int32), blank(bool), blank(jnp.float32), blank(jnp.float32))
    going = lambda state: ~state.done & (state.step < limit)

    def running(carry):
        i, state, _ = carry
        return (i < steps) & (jnp.sum(going(state)) >= busy)

    def body(carry):
        i, state, part = carry
        token, log_prob, sampler_log_prob = _draw(state, config, least, limit)
        alive = going(state)
        column = Part(token, alive, log_prob, sampler_log_prob)
        keep = lambda new: jnp.where(alive, new, jnp.zeros((), new.dtype))
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, keep(new)[:, None], i, axis=1
        )
        part = jax.tree.map(put, part, column)
        stops = jnp.asarray(config.stop_ids or (-1,))
        ended = jnp.any(token[:, None] == stops[None, :], axis=1)
        # Tokens after the end are not of the text, which `append` may continue.
        inputs = inputs_of(token[:, None], state.position[:, None], alive[:, None])
        found = next_token(model, params, inputs, state.cache)
        if state.history is not None:
            history = written(state.history, token[:, None], alive[:, None], state.position)
            state = state._replace(history=history)
        state = state._replace(
            cache=found.cache,
            logits=found.logits,
            position=state.position + alive,
            done=state.done | (alive & ended),
            step=state.step + alive,
        )
        return i + 1, state, part

    return jax.lax.while_loop(running, body, (jnp.zeros((), jnp.int32), state, part))[1:]


def decode(
    model: Decoder,
    params: Params,
    state: State,
    config: SamplingConfig,
    steps: int = CHUNK,
    limits: Any = None,
    busy: int = 1,
) -> tuple[State, Part]:
    """Decodes up to `steps` more tokens per row; stops when all rows are done. Donates `state`.

    Args:
        limits: [B], the tokens of each row's answer, at most; None: `config.max_new_tokens`.
        busy: it stops when fewer rows than this go on.

    Raises:
        ValueError: if a rule needs past tokens and the state has no history; see `remember`.
    """
    config = without_media(model, config)
    if config.looks_back and state.history is None:
        raise ValueError(
            "decode: repetition_penalty, no_repeat_ngram_size and bad_words need the tokens so far; call "
            "remember(state, tokens, valid, slots) after prefill, with the same arguments."
        )
    rows = state.done.shape
    limit = config.max_new_tokens if limits is None else np.asarray(limits)
    limit = jnp.asarray(np.broadcast_to(limit, rows), jnp.int32)
    least = jnp.asarray(config.min_new_tokens, jnp.int32) if config.min_new_tokens else None
    # Settings that are traced values, or that only the host uses, must not cause recompilation.
    config = dataclasses.replace(config, max_new_tokens=1, min_new_tokens=0, stop_strings=())
    return _decode(model, params, state, limit, least, jnp.asarray(busy, jnp.int32), config, steps)


def _draw(
    state: State,
    config: SamplingConfig,
    least: jax.Array | None = None,
    limit: jax.Array | None = None,
):
    """(token, log-prob under the full vocabulary, log-prob as sampled), each [B].

    `least` [] and `limit` [B] are the least and the largest number of tokens of an answer; None: not known.
    """
    # Not log_softmax, which would write a table of log-probs per token to read one entry per row.
    log_prob_of = lambda table, token: (
        jnp.take_along_axis(table, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(table, axis=-1)
    )
    scaled = state.logits.astype(jnp.float32) / (config.temperature or 1.0)
    logits = state.logits
    forced = config.forced_end is not None and limit is not None
    ids = bool(config.bad_words or config.bad_first)
    if processed := config.looks_back or ids or least is not None or forced:
        short = None if least is None else state.step < least
        last = state.step + 1 >= limit if forced else None
        at = short, last, state.step == 0
        logits = process_logits(logits, config, state.history, state.position, *at)
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, log_prob_of(scaled, token), jnp.zeros(token.shape)
    cut = transform_logits(logits, config)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.step)
    token = jax.vmap(jax.random.categorical)(keys, cut).astype(jnp.int32)
    log_prob = log_prob_of(scaled, token)
    # If no rule changes the logits, both tables are the same: each pass over one costs time per token.
    changed = processed or config.cuts
    return token, log_prob, log_prob_of(cut, token) if changed else log_prob


def inputs_of(tokens, positions, valid):
    """Returns the batch that a model's forward reads of tokens, positions and valid, [B, T] each."""
    return {"tokens": tokens, "positions": positions, "segment_ids": valid.astype(jnp.int32)}


def next_token(model, params, batch, cache):
    """Predicts from the last token's hidden state [B, D]."""
    return model.forward(params, batch, cache=cache).at(slice(None), -1)


def separate(model: Decoder, params: Params) -> Params:
    """Unstacks the layers: a scan that carries the stacked cache would copy it for every token."""
    layers = layers_of(model)
    return params if layers is None else unstack_layers(params, layers)


def _gather(part, done, rows, limit) -> Generation:
    mask = part.mask[:rows, :limit]
    cut = lambda table: np.where(mask, table[:rows, :limit], 0)
    finish = ["stop" if ended else "length" for ended in done[:rows]]
    return Generation(
        cut(part.tokens), mask, cut(part.log_probs), cut(part.sampler_log_probs), finish
    )
