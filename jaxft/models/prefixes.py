"""Attention in both directions among the tokens before an answer: an image and its prompt (PaliGemma)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attention_mask


def prefix_of(batch: Mapping[str, Any]) -> jax.Array:
    """[B, T] bool: the tokens before the answer of each segment, which see each other in both directions.

    An answer begins with the first token that trains (`loss_mask`) or, in experience, with the last N
    columns, those of `completion_mask`. A batch without both holds prompts. A column `prefix_mask` [B, T], if
    there is one, counts instead.
    """
    tokens = jnp.asarray(batch["tokens"])
    if "prefix_mask" in batch:
        return jnp.asarray(batch["prefix_mask"]) > 0
    if "completion_mask" in batch:
        first = tokens.shape[1] - batch["completion_mask"].shape[-1]
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]) < first, tokens.shape)
    if "loss_mask" not in batch:
        return jnp.ones(tokens.shape, bool)
    trains = jnp.asarray(batch["loss_mask"]) > 0
    segments = batch.get("segment_ids")
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else jnp.asarray(segments)
    begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    count = jnp.cumsum(trains, axis=1)
    # The count before each segment; counts never decrease, so the last is the largest.
    before = jax.lax.cummax(jnp.where(begins, count - trains, 0), axis=1)
    return count == before


def prefix_masks(prefix: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(causal mask, pairs of tokens of one prefix), [1 or B, 1, T, T] and [B, 1, T, T]."""
    length = prefix.shape[1]
    pairs = prefix[:, None, :, None] & prefix[:, None, None, :]
    if segment_ids is not None:
        pairs = pairs & attention_mask(length, segment_ids, None, False)
    return attention_mask(length, segment_ids, None, True), pairs
