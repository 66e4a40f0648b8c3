"""Answers that go on: rows of a batch continue in the cache that holds them, instead of a new prefill."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation.decoding import SamplingConfig
from jaxft.generation.padding import MIN_BUCKET, bucket, left_pad
from jaxft.generation.requests import check_request, row_keys
from jaxft.generation.sampler import (
    Generation,
    Params,
    State,
    answered,
    append,
    check_lengths,
    chunks,
    opened,
)
from jaxft.models import Cache, Decoder, virtual_tokens
from jaxft.parallel import in_turn


class Turn(NamedTuple):
    """State after a turn, with which the next turn of some of its rows begins."""

    state: State
    contexts: list[list[int]]  # the tokens of each row so far, whose keys the state's cache holds


def can_continue(model: Decoder) -> bool:
    """True if a row may go on in another place of a cache, without its last tokens.

    Slots of keys and values have no meaning but their order; the state of a Gated DeltaNet is that of all
    tokens so far.
    """
    cache = jax.eval_shape(functools.partial(model.init_cache, 1, MIN_BUCKET))
    ropes = (getattr(model.config, name, None) for name in ("rope", "local_rope"))
    # Some frequencies depend on the cache's length.
    by_length = any(rope is not None and rope.by_length for rope in ropes)
    return isinstance(cache, Cache) and cache.rewinds and not by_length


def first_turn(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    *,
    samples: int = 1,
    columns: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> tuple[Generation, Turn]:
    """Returns what `generate` gives, and what `next_turn` needs: all rows' keys and values.

    Raises:
        ValueError: as `generate`.
    """
    most = check_request(prompts, config, samples, None, tokenizer)
    chunk, slots = chunks(config)
    state, most = opened(model, params, prompts, key, config, slots, most, samples, columns, None)
    rows = [list(prompt) for prompt in prompts for _ in range(samples)]
    return _answered(model, params, state, config, most, rows, tokenizer, chunk)


def next_turn(
    model: Decoder,
    params: Params,
    turn: Turn,
    rows: Sequence[int],
    contexts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    *,
    row_ids: Sequence[int],
    tokenizer: Any = None,
) -> tuple[Generation, Turn]:
    """Returns what `generate` gives for longer contexts of some rows; only their new tokens are computed.

    Args:
        turn: of the turn before; it is consumed.
        rows: the rows of that turn that go on, which become rows 0, 1, 2...
        contexts: all tokens of each, which begin with those of its row in `turn`.
        key, config, row_ids, tokenizer: as for `generate`.

    Raises:
        ValueError: as `generate`, for rows that the turn has not, or another number of contexts than rows,
            for a context that does not begin with its row's, and for a cache that holds the states of layers.
    """
    if not turn.state.cache.rewinds:
        raise ValueError(
            "next_turn: the layers of Gated DeltaNet keep one state of all tokens, and the last ones cannot "
            "be taken back; use generate for each turn (`can_continue` says which models need it)."
        )
    most = check_request(contexts, config, 1, None, tokenizer)
    check_lengths(model, params, contexts, config)
    _check_rows(turn, rows, contexts)
    for row, context in zip(rows, contexts, strict=True):
        known = turn.contexts[row]
        if list(context[: len(known)]) != known:
            raise ValueError(
                f"next_turn: the context does not begin with the {len(known)} tokens of row {row}."
            )
    # The last known token is computed again: its logits are those of the next token if nothing is added.
    kept = [len(turn.contexts[row]) - 1 for row in rows]
    tokens, valid = left_pad([c[n:] for c, n in zip(contexts, kept, strict=True)], model.config)
    size, (chunk, new) = len(tokens), chunks(config)
    fill = lambda x: np.pad(np.asarray(x, np.int32), (0, size - len(x)))
    width = bucket(max(kept) + virtual_tokens(params), MIN_BUCKET)
    slots = bucket(width + tokens.shape[1], MIN_BUCKET) + new
    state = _moved(in_turn(turn.state._replace(keys=None)), fill(rows), fill(kept), width, slots)
    # Rows of padding are not alive; `append` ends the rest's pause.
    state = append(model, params, in_turn(state), jnp.asarray(tokens), jnp.asarray(valid))
    state = in_turn(state)._replace(keys=row_keys(key, len(rows), row_ids, size))
    known = [list(context) for context in contexts]
    return _answered(model, params, state, config, fill(most), known, tokenizer, chunk)


def _check_rows(turn, rows, contexts):
    count = len(turn.contexts)
    if len(rows) != len(contexts) or not all(0 <= row < count for row in rows):
        raise ValueError(
            f"next_turn: rows {list(rows)[:8]} must be numbers of the turn's {count} rows, from 0 on, one "
            f"for each of {len(contexts)} contexts."
        )


def _answered(model, params, state, config, most, contexts, tokenizer, chunk):
    state, out = answered(model, params, state, config, most, len(contexts), tokenizer, chunk)
    contexts = [row + ids for row, ids in zip(contexts, out.completions, strict=True)]
    return out, Turn(state, contexts)


@functools.partial(jax.jit, static_argnames=("width", "slots"))
def _moved(state: State, rows: jax.Array, kept: jax.Array, width: int, slots: int) -> State:
    """The first kept[i] tokens of row rows[i] as row i, in front of slot `width` of a cache of `slots`."""
    cache = state.cache
    valid = cache.valid[rows] & (cache.positions[rows] < (kept + cache.virtual)[:, None])
    # In order, those that stay last.
    order = jnp.argsort(valid, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (max(0, width - cache.length), 0)))[:, -width:]
    blank = lambda x, axis: [(0, slots - width if i == axis else 0) for i in range(x.ndim)]

    def move(x, axis):
        index = jnp.expand_dims(order, [i for i in range(1, x.ndim) if i != axis])
        return jnp.pad(jnp.take_along_axis(x[rows], index, axis=axis), blank(x, axis))

    there = jnp.arange(width)[None] >= width - jnp.sum(valid, axis=1, keepdims=True)
    moved = dataclasses.replace(
        cache,
        keys=tuple(move(x, 3) for x in cache.keys),
        values=tuple(move(x, 2) for x in cache.values),
        positions=move(cache.positions, 1),
        valid=jnp.pad(there, ((0, 0), (0, slots - width))),
        index=jnp.asarray(width, jnp.int32),
    )
    history = state.history
    if history is not None:
        history = jnp.pad(history[rows], ((0, 0), (0, slots)), constant_values=-1)[:, :slots]
    return state._replace(
        cache=moved,
        logits=state.logits[rows],
        position=kept,
        done=jnp.ones(rows.shape, bool),
        step=jnp.zeros(rows.shape, jnp.int32),
        history=history,
    )
