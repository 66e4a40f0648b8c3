"""Grouped-query attention: a plain reference, and the fastest form that a backend has."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["reference", "blocked", "xla", "cudnn"]
# jax.ad_checkpoint.checkpoint_name of what a fused kernel keeps for its backward pass.
KERNEL_RESULT = "attention_kernel"
BLOCK = 128  # query rows whose masked keys are skipped together


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(cap(scale Q K^T) + mask) V, softmax in float32.

    Args:
        query: [B, T, H, K]; key, value: [B, T, G, K], where H is a multiple of G.
        segment_ids: [B, T]; a query sees the keys of its own segment alone, and 0 is padding that
            no other segment sees. None: one segment.
        window: a query sees the `window` last keys, itself counted, by index. None: all.
        causal: hide later keys.
        scale: of the scores; None: K^-1/2.
        softcap: c in c tanh(scores / c), as in Gemma 2. None: no cap.
        implementation: "reference" is plain jnp; "blocked" skips the keys above the diagonal;
            "xla" and "cudnn" are jax.nn.dot_product_attention's. None: the best for this backend.

    Returns: [B, T, H, K] in the query's data type. A row that sees nothing is the mean of values.
    """
    if implementation is None:
        implementation = _best(query, segment_ids, window, causal, softcap)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if implementation in ("xla", "cudnn"):
        return _library(
            query, key, value, segment_ids, window, causal, scale, softcap, implementation
        )
    if implementation == "blocked":
        return _blocked(query, key, value, segment_ids, window, causal, scale, softcap)
    mask = attention_mask(query.shape[1], segment_ids, window, causal)
    return attend(query, key, value, mask, scale=scale, softcap=softcap)


def attention_mask(
    length: int,
    segment_ids: jax.Array | None,
    window: int | jax.Array | None,
    causal: bool,
    start: int = 0,
    rows: int | None = None,
) -> jax.Array | None:
    """[1 or B, 1, rows, length], True where a query of `start`..`start + rows` sees a key, or None."""
    rows = length if rows is None else rows
    distance = (jnp.arange(rows) + start)[:, None] - jnp.arange(length)[None, :]
    visible = distance >= 0 if causal else None
    if window is not None:
        inside = (distance < window) & (distance > -window)
        visible = inside if visible is None else visible & inside
    visible = None if visible is None else visible[None, None]
    if segment_ids is not None:
        queries = segment_ids[:, start : start + rows]
        same = (queries[:, None, :, None] == segment_ids[:, None, None, :length]) & (
            segment_ids[:, None, None, :length] > 0
        )
        visible = same if visible is None else visible & same
    return visible


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """The reference: scores in full. `mask` broadcasts to [B, 1, T, S], True where visible."""
    grouped = _grouped(query, key.shape[2])
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask, scale, softcap).astype(value.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, value).reshape(query.shape)


def attend_cache(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """`attend` for a cache's keys [B, G, K, S] and values [B, G, S, K]: no operand is transposed."""
    grouped = _grouped(query, keys.shape[1])
    scores = jnp.einsum("btghk,bgks->bghts", grouped, keys, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask, scale, softcap).astype(values.dtype)
    return jnp.einsum("bghts,bgsk->btghk", weights, values).reshape(query.shape)


def _grouped(query, groups):
    batch, rows, heads, size = query.shape
    return query.reshape(batch, rows, groups, heads // groups, size)


def _weights(scores, mask, scale, softcap):
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # A finite floor: a row with no visible key gives a mean instead of NaN.
        scores = jnp.where(mask[:, :, None], scores, -1e30)
    return jax.nn.softmax(scores, axis=-1)


def _best(query, segment_ids, window, causal, softcap) -> Implementation:
    backend = jax.default_backend()
    if backend == "gpu" and softcap is None and query.dtype in (jnp.bfloat16, jnp.float16):
        # cuDNN takes causal masks, windows and lengths, not arbitrary segments.
        return "cudnn" if segment_ids is None and causal else "xla"
    if backend == "cpu" and causal and query.shape[1] > BLOCK:
        return "blocked"
    return "reference"


def _library(query, key, value, segment_ids, window, causal, scale, softcap, implementation):
    if softcap is not None:
        raise ValueError(f"attention: {implementation!r} has no softcap; use 'reference'.")
    mask = None
    if segment_ids is not None or isinstance(window, jax.Array):
        mask = attention_mask(query.shape[1], segment_ids, window, causal)
        window, causal = None, False
    # local_window_size counts the keys beside the query itself.
    beside = None if window is None else (window - 1, 0 if causal else window - 1)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=causal,
        local_window_size=beside,
        implementation=implementation,
    )


def _blocked(query, key, value, segment_ids, window, causal, scale, softcap):
    """The reference over blocks of queries, each against the keys up to its last row alone."""
    if not causal:
        raise ValueError("attention: 'blocked' needs causal=True; use 'reference' or 'xla'.")
    length, outputs = query.shape[1], []
    for start in range(0, length, BLOCK):
        rows = min(BLOCK, length - start)
        end = start + rows
        mask = attention_mask(end, segment_ids, window, causal, start, rows)
        block = query[:, start:end]
        outputs.append(
            attend(block, key[:, :end], value[:, :end], mask, scale=scale, softcap=softcap)
        )
    return jnp.concatenate(outputs, axis=1)
