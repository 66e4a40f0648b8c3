"""Continuous batching: a row that is finished gives its place to the next answer at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation.decoding import SamplingConfig
from jaxft.generation.padding import left_pad, padded
from jaxft.generation.requests import after_string, check_request, row_keys, sample_keys
from jaxft.generation.sampler import (
    CHUNK,
    Generation,
    Params,
    Part,
    State,
    check_lengths,
    decode,
    prefill,
    remember,
)
from jaxft.models import Cache, Decoder
from jaxft.parallel import in_turn, to_host

LOOK = 16  # tokens decoded between two inspections by the host
IDLE = 16  # one place in so many may be free before the host looks again, if answers wait


def generate_continuously(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    *,
    places: int = 16,
    samples: int = 1,
    columns: Mapping[str, Any] | None = None,
    row_ids: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    tokenizer: Any = None,
    cache_dtype: Any = None,
    chunk: int = LOOK,
    progress: Callable[[int, int], Any] | None = None,
) -> Generation:
    """Generates what `generate` does, `places` answers at a time: each takes the place of one that ended.

    A padded batch decodes each of its answers for as long as the longest; here an answer that waits begins
    soon after others have ended. Each prompt is prefilled by itself, once for all of its samples. There is
    one program of decoding for a number of places, and one of prefill for each bucket of prompt lengths. An
    answer has the tokens that `generate` gives, whatever its place and the order of the others; log-probs
    agree to rounding.

    Args:
        model: a Decoder, or another model whose `init_cache` returns a `jaxft.models.Cache` and whose
            attention honours its `ring`, as `cache_mask` does.
        params, prompts, key, config, samples, columns, row_ids, limits, tokenizer, cache_dtype: as for
            `generate`.
        places: answers at a time: rows of the compiled program.
        chunk: tokens decoded between two inspections by the host, at most.
        progress: called after each inspection with the numbers of finished and of all answers.

    Raises:
        ValueError: as `generate`; for fewer than 1 place or token; and for a model with another cache, such
            as an encoder-decoder.
    """
    most = check_request(prompts, config, samples, limits, tokenizer)
    _check(model, places, chunk)
    width = left_pad(prompts, model.config)[0].shape[1]  # and checks them
    check_lengths(model, params, prompts, config)
    rows = len(prompts) * samples
    keys = sample_keys(row_keys(key, len(prompts), row_ids), samples)
    answers = _Answers(rows, np.repeat(most, samples), config, tokenizer)
    slots = width + -(-config.max_new_tokens // CHUNK) * CHUNK
    columns = {
        name: padded(name, x, len(prompts), len(prompts)) for name, x in (columns or {}).items()
    }
    filled = _prefilled(model, params, prompts, samples, config, slots, columns, cache_dtype)
    state, seats, waiting = None, np.full(min(places, rows), -1), iter(range(rows))
    while True:
        for place in np.flatnonzero(seats < 0):
            if (row := next(waiting, None)) is None:
                break
            found = next(filled)
            state = _blank(found, len(seats)) if state is None else state
            state = in_turn(_seat(in_turn(state._replace(keys=None)), found, place))
            seats[place] = row
        if (seats < 0).all():
            return answers.generation()
        # The host knows which places are free: an answer may have reached its limit, or a string.
        state = state._replace(keys=keys[np.maximum(seats, 0)], done=jnp.asarray(seats < 0))
        room = np.where(seats < 0, 0, answers.limits[seats])
        # While answers wait, at most a 16th of the places is idle.
        more = answers.finished + len(seats) < rows
        busy = len(seats) - len(seats) // IDLE if more else 1
        state, part = decode(model, params, state, config, chunk, room, busy)
        part, done = to_host((part, state.done))
        for place in np.flatnonzero(seats >= 0):
            if answers.add(seats[place], jax.tree.map(lambda x, p=place: x[p], part), done[place]):
                seats[place] = -1
        if progress is not None:
            progress(answers.finished, rows)


def _check(model, places, chunk):
    for name, value in (("places", places), ("chunk", chunk)):
        if value < 1 or value != int(value):
            raise ValueError(
                f"generate_continuously: {name} must be a whole number of at least 1, got {value}."
            )
    cache = jax.eval_shape(functools.partial(model.init_cache, 1, CHUNK))
    if not isinstance(cache, Cache):
        raise ValueError(
            f"generate_continuously: {type(model).__name__} has a {type(cache).__name__}, whose rows cannot "
            "begin one after the other; use generate."
        )


def _prefilled(
    model, params, prompts, samples, config, slots, columns, cache_dtype
) -> Iterator[State]:
    """The state after each prompt, of one row, `samples` times: it is computed when it is first needed."""
    for i, prompt in enumerate(prompts):
        tokens, valid = map(jnp.asarray, left_pad([prompt], model.config))
        own = {name: x[i : i + 1] for name, x in columns.items()}
        state = prefill(model, params, tokens, valid, None, slots, cache_dtype, own)
        if config.looks_back:
            state = remember(state, tokens, valid, slots)
        for _ in range(samples):
            yield state


@functools.partial(jax.jit, static_argnames=("places",))
def _blank(state: State, places: int) -> State:
    """A state of `places` rows like the given one's, all of them free, whose cache is a ring."""
    wide = lambda x: jnp.zeros((places, *x.shape[1:]), x.dtype) if x.ndim else x
    blank = jax.tree.map(wide, state)
    cache = dataclasses.replace(blank.cache, ring=True)
    return blank._replace(cache=cache, done=jnp.ones(places, bool))


@functools.partial(jax.jit, donate_argnames=("state",))
def _seat(state: State, found: State, place: jax.Array) -> State:
    """The state with the only row of `found` in a place."""
    put = lambda rows, row: jax.lax.dynamic_update_slice_in_dim(rows, row, place, 0)
    rest = lambda state: state._replace(cache=None, keys=None)
    cache = state.cache.seated(found.cache, place)
    return jax.tree.map(put, rest(state), rest(found))._replace(cache=cache)


class _Answers:
    """The answers so far, in the order of the request."""

    def __init__(self, rows: int, limits: np.ndarray, config: SamplingConfig, tokenizer: Any):
        self.limits, self._config, self._tokenizer = limits, config, tokenizer
        table = lambda dtype: np.zeros((rows, config.max_new_tokens), dtype)
        self._part = Part(*map(table, (np.int32, bool, np.float32, np.float32)))
        self._finish = [""] * rows

    @property
    def finished(self) -> int:
        """The number of answers that have ended."""
        return sum(map(bool, self._finish))

    def add(self, row: int, new: Part, ended: bool) -> bool:
        """Adds the tokens of a chunk to a row's answer; returns whether it has ended."""
        mask = self._part.mask[row]
        start, count = mask.sum(), new.mask.sum()
        for whole, part in zip(self._part, new, strict=True):
            whole[row, start : start + count] = part[:count]
        if self._config.stop_strings:
            ids = self._part.tokens[row][mask].tolist()
            end = after_string(ids, self._config, self._tokenizer)
            if end is not None:
                for whole in self._part:
                    whole[row, end:] = 0
                ended = True
        if ended or mask.sum() >= self.limits[row]:
            self._finish[row] = "stop" if ended else "length"
        return bool(self._finish[row])

    def generation(self) -> Generation:
        """The answers as the result of a sampler."""
        return Generation(*self._part, self._finish)
