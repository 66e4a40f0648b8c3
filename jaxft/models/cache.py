"""The key-value cache of a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Memory(NamedTuple):
    """The past tokens of a layer that has a state instead of keys and values: see jaxft.models.delta."""

    window: jax.Array  # [B, taps - 1, C]: inputs of the convolution, the last tokens' ones
    state: jax.Array  # [B, H, K, F] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of past tokens. Rows share one write index: ragged prompts are left-padded.

    The slots of a `ring` are written in turn, the first again after the last, one token a call. No slot of
    a row is overwritten while it is needed if the row's tokens fit into the slots: `seated` starts a row
    anew at any time, without one write index per row, which would cost a scatter for every token.

    There is one pair of arrays per layer, not one stacked pair: a loop that carries a stacked cache copies it
    for every token. Layers that read the keys and values of another have no pair, and the pairs of the others
    may have heads of unlike numbers and sizes. Layers with a state have a `Memory` instead, which has no
    slots: it is that of all tokens so far, so that tokens cannot be taken back (`rewinds`). The axes have the
    order in which `attend_cache` multiplies them: with another order, XLA:CPU copies every layer's cache for
    every token, a third of the time of decoding.
    """

    keys: tuple[jax.Array, ...]  # [B, G, K, S] of each layer that attends with its own keys
    values: tuple[jax.Array, ...]  # [B, G, S, K] of the same layers
    positions: jax.Array  # [B, S] int32, as given to the model
    valid: jax.Array  # [B, S] bool: written and not padding
    index: jax.Array  # [] int32: slots written so far
    memories: tuple[Memory, ...] = ()  # of the layers with a state, in their order
    virtual: int = dataclasses.field(default=0, metadata={"static": True})  # tokens in front
    # True before the first write; static, so that a prefill can attend only among its own tokens.
    empty: bool = dataclasses.field(default=False, metadata={"static": True})
    ring: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def length(self) -> int:
        """Number of slots, S."""
        return self.valid.shape[1]

    @property
    def rewinds(self) -> bool:
        """True if the last tokens of a row can be taken back: no layer has a state."""
        return not self.memories

    def take_rows(self, rows: jax.Array, start: int) -> Cache:
        """The cache whose row i is the present row rows[i], from slot `start` on.

        Slots before `start` stay: the caller knows that rows[i] has the same there as row i, as beams of one
        prompt do, and that most of a cache is copied for nothing.
        """

        def pick(x, axis):
            part = jax.lax.slice_in_dim(x, start, x.shape[axis], axis=axis)
            part = part.at[rows].get(mode="promise_in_bounds")
            return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)

        return dataclasses.replace(
            self,
            keys=tuple(pick(x, 3) for x in self.keys),
            values=tuple(pick(x, 2) for x in self.values),
            positions=pick(self.positions, 1),
            valid=pick(self.valid, 1),
            memories=jax.tree.map(
                lambda x: x.at[rows].get(mode="promise_in_bounds"), self.memories
            ),
        )

    def seated(self, other: Cache, place: jax.Array) -> Cache:
        """This ring, with row 0 of `other` as its row `place`, as if it had just been written there.

        Both have the same number of slots and of virtual tokens; `other` was written from its first slot on.
        """
        shift = self.index - other.index

        def seat(rows, row):
            row = row[:1].astype(rows.dtype)
            return jax.lax.dynamic_update_slice_in_dim(rows, row, place, 0)

        def put(rows, row, axis):
            return seat(rows, jnp.roll(row[:1], shift, axis))

        layers = lambda ours, theirs, axis: tuple(
            put(*pair, axis) for pair in zip(ours, theirs, strict=True)
        )
        return dataclasses.replace(
            self,
            keys=layers(self.keys, other.keys, 3),
            values=layers(self.values, other.values, 2),
            positions=put(self.positions, other.positions, 1),
            valid=put(self.valid, other.valid, 1),
            memories=jax.tree.map(seat, self.memories, other.memories),
        )


def take_rows(cache: Any, rows: jax.Array, start: int) -> Any:
    """A cache of any kind with rows[i] as its row i, as beam search needs it after each token.

    A part that has a method `take_rows(rows, start)`, such as a `Cache`, does it by itself: what all beams
    of a prompt have in common, such as the keys of a source, need not be copied. In any other part, rows
    are the first axis of each array, and scalars have none.

    Args:
        rows: [B] int32, each within the beams of the same prompt as its index.
        start: the number of slots that the beams of a prompt have in common.
    """
    own = lambda x: hasattr(x, "take_rows")

    def pick(x):
        if own(x):
            return x.take_rows(rows, start)
        return x.at[rows].get(mode="promise_in_bounds") if x.ndim else x

    return jax.tree.map(pick, cache, is_leaf=own)


def empty_cache(
    shapes: Sequence[tuple[int, int]],
    batch: int,
    length: int,
    dtype=jnp.float32,
    memories: tuple[Memory, ...] = (),
) -> Cache:
    """A cache of `length` empty slots, with the memories of the layers with a state.

    `shapes` are (heads, features) of each layer with keys and values.

    Its pytree differs from a written cache's (`empty`): let a loop carry the cache from the second token
    on, or use `dataclasses.replace(cache, empty=False)`.
    """
    zeros = lambda *shape: jnp.zeros((batch, *shape), dtype)
    return Cache(
        keys=tuple(zeros(groups, size, length) for groups, size in shapes),
        values=tuple(zeros(groups, length, size) for groups, size in shapes),
        positions=jnp.zeros((batch, length), jnp.int32),
        valid=jnp.zeros((batch, length), bool),
        index=jnp.zeros((), jnp.int32),
        memories=memories,
        empty=True,
    )


def reserve(cache: Cache, positions: jax.Array, valid: jax.Array, virtual: int = 0) -> Cache:
    """The cache with the next T slots marked (positions, valid [B, T]); layers write keys later.

    `virtual` tokens (see jaxft.models.soft) then come first.

    Raises:
        ValueError: for several tokens at once in a ring.
    """
    index = cache.index + positions.shape[1]
    if cache.ring:
        if positions.shape[1] != 1:
            raise ValueError(
                f"a cache whose slots are a ring takes 1 token a call, got {positions.shape[1]}; write them "
                "into a separate cache, and then `seated`."
            )
        index = index % cache.length
    start = (jnp.zeros((), jnp.int32), cache.index)
    update = jax.lax.dynamic_update_slice
    return dataclasses.replace(
        cache,
        positions=update(cache.positions, positions.astype(jnp.int32), start),
        valid=update(cache.valid, valid, start),
        index=index,
        virtual=virtual,
        empty=False,
    )


def write(
    cached: tuple[jax.Array, jax.Array], key: jax.Array, value: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's (keys, values) with new ones [B, T, G, K] at slots index..index + T."""
    keys, values = cached
    zero = jnp.zeros((), jnp.int32)
    put = jax.lax.dynamic_update_slice
    columns = jnp.transpose(key, (0, 2, 3, 1)).astype(keys.dtype)
    rows = jnp.swapaxes(value, 1, 2).astype(values.dtype)
    at_columns, at_rows = (zero, zero, zero, index), (zero, zero, index, zero)
    return put(keys, columns, at_columns), put(values, rows, at_rows)


def cache_mask(
    cache: Cache, start: jax.Array, positions: jax.Array, window: int | None = None
) -> jax.Array:
    """[B, 1, R, S]: the slots of a cache that queries at slots start..start + R, positions [B, R], see.

    A window counts positions, including the query's own.
    """
    mask = cache.valid[:, None, None, :]
    if not cache.ring:  # where all valid slots but the query's own are of earlier tokens
        slots = jnp.arange(cache.length)
        causal = slots[None, :] <= start + jnp.arange(positions.shape[1])[:, None]
        mask = causal[None, None] & mask
    return mask if window is None else mask & window_mask(positions, cache.positions, window)


def window_mask(positions: jax.Array, key_positions: jax.Array, window) -> jax.Array:
    """[B, 1, T, S]: keys at most `window` positions back, including the query's own."""
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    return distance < window
