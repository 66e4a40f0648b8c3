"""T5's relative positions: a learned number for each head and range of distances, added to the scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.weights import WeightLike, take


def distance_buckets(count: int, furthest: int) -> np.ndarray:
    """[furthest + 1] int32: the bucket of each distance 0, 1... tokens; longer ones have the last.

    Half of the `count` buckets hold one distance each, the others ranges that grow exponentially up to
    `furthest`: Raffel et al., 2020, arxiv.org/abs/1910.10683, section 2.1. The arithmetic is float32, as
    in transformers.
    """
    exact = count // 2
    distances = np.arange(furthest + 1, dtype=np.float32)
    ratio = np.log(np.maximum(distances, 1) / np.float32(exact))
    share = ratio / np.float32(math.log(furthest / exact)) * np.float32(count - exact)
    wide = np.minimum(exact + share.astype(np.int32), count - 1)
    return np.where(distances < exact, distances, wide).astype(np.int32)


def relative_bias(
    table: WeightLike,
    start: int | jax.Array,
    rows: int,
    length: int,
    *,
    furthest: int,
    bidirectional: bool,
) -> jax.Array:
    """[1, H, rows, length]: the term of queries start..start + rows and keys 0..length.

    Args:
        table: [buckets, H]. If `bidirectional`, the second half of the buckets is for later keys.
        start: index of the first query; distances count tokens, padding included.
        rows: number of queries.
        length: number of keys.
        furthest: the distance from which on all have the last bucket.
        bidirectional: whether queries see later keys.
    """
    count = table.shape[0] // (2 if bidirectional else 1)
    buckets = jnp.asarray(distance_buckets(count, furthest))
    distance = jnp.arange(length)[None, :] - (start + jnp.arange(rows))[:, None]
    near = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    index = jnp.take(buckets, jnp.minimum(near, furthest))
    if bidirectional:
        index = index + jnp.where(distance > 0, count, 0)
    return jnp.moveaxis(take(table, index), -1, 0)[None]
