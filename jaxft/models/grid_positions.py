"""Rotary positions in time, height and width of texts with images (Qwen2-VL's M-RoPE).

Wang et al., 2024, arxiv.org/abs/2409.12191, section 2.1. The time of an image's tokens is the position of its
first one; their row and column in the image are added to it. The next text follows the largest of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grid_positions(
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    token: int,
    places: jax.Array,
    merge: int,
) -> jax.Array:
    """[3, B, T]: time, height and width of each token, which restart in each segment.

    Args:
        tokens: [B, T].
        segment_ids: [B, T]; None: one segment.
        token: the id of an image's tokens.
        places: [B, M, s², 3] of `GridVision`, a block for each of these tokens in order.
        merge: s.
    """
    rows, columns = ((places[:, :, 0, i] - 1) // merge for i in (0, 1))
    there = places[:, :, 0, 0] > 0
    starts = there & (rows == 0) & (columns == 0)
    # A block is the last of its image if the next one begins an image, or there is none.
    after = (starts | ~there)[:, 1:]
    last = jnp.pad(after, ((0, 0), (0, 1)), constant_values=True)
    here = tokens == token
    place = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, places.shape[1] - 1)
    of_token = lambda x: jnp.where(here, jnp.take_along_axis(x, place, axis=1), 0)
    row, column = of_token(rows), of_token(columns)
    step = jnp.where(here, jnp.where(of_token(last) > 0, jnp.maximum(row, column) + 1, 0), 1)
    before = jnp.cumsum(step, axis=1) - step
    if segment_ids is not None:
        begins = segment_ids != jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        before = before - jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    return jnp.stack([before, before + row, before + column])


def next_positions(positions: jax.Array, valid: jax.Array, new: jax.Array) -> jax.Array:
    """[B, T]: the positions of new tokens of text after those in a cache.

    Args:
        positions, valid: [B, S] of the cache's slots.
        new: [B, T] bool, the new tokens that count.
    """
    following = jnp.max(jnp.where(valid, positions, -1), axis=1, keepdims=True) + 1
    return following + jnp.maximum(jnp.cumsum(new, axis=1) - 1, 0)
