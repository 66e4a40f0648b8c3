"""Grouped-query attention: a plain reference, and the fastest form that a backend has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.kernels.backend import gpu_capability, target_platform
from jaxft.kernels.splash import TILE, splash_attention
from jaxft.parallel.attention import attention_layout
from jaxft.parallel.axes import length_axes

Implementation = Literal["reference", "blocked", "tiled", "gathered", "splash", "xla", "cudnn"]
BLOCK = 128  # query rows whose masked keys are skipped together
QUERIES = 512  # the most whose scores are in memory at once when keys are gathered
FEW = 16  # queries at a time against a cache
# The first compute capabilities on which cuDNN has fused attention, and for heads of 256.
AMPERE, HOPPER = (8, 0), (9, 0)


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    gradient: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(cap(scale Q K^T) + mask) V, softmax in float32.

    Args:
        query, key, value: H, the number of query heads, is a multiple of that of key heads, G.
        segment_ids: a query sees only the keys of its own segment; 0 is padding, which no other
            segment sees. None: one segment.
        window: a query sees the last `window` keys by index, its own included. None: all.
        causal: hide later keys.
        scale: multiplies the scores; None: K^-1/2.
        softcap: c in c tanh(scores / c), as in Gemma 2. None: no cap.
        sinks: a logit for each query head that joins its softmax, as in gpt-oss: the weights of the keys
            sum to less than 1. It is neither scaled nor capped. "xla" and "cudnn" have none.
        gradient: False if none will be taken: then a form that holds all scores is not chosen.
        implementation: "reference" is plain jnp; "blocked" skips the keys above the diagonal;
            "tiled" does too, and holds the scores of one tile, but its gradient costs memory;
            "gathered" is for meshes that split rows' tokens over "context", and stores no scores;
            "splash" runs on TPUs, and needs a mesh, if any, in context: see `splash_attention`;
            "xla" and "cudnn" are jax.nn.dot_product_attention's. None: the best for the mesh in
            context or, without one, for this process's backend; when compiling for other devices,
            set the mesh (jax.set_mesh) or name the implementation.

    Returns: heads side by side, in the query's data type. A query that sees no key gets the mean of
    values (of padding, for "splash"), or 0 with sinks.

    Raises:
        ValueError: for an implementation that is unknown or does not support the arguments.
    """
    if implementation is None:
        implementation = _best(query, key, segment_ids, window, causal, softcap, sinks)
        if not gradient and query.shape[1] > BLOCK:
            dense = implementation in ("reference", "blocked", "xla")
            implementation = "tiled" if dense else implementation
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"attention: unknown implementation {implementation!r}; "
            f"expected one of {', '.join(get_args(Implementation))}."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    masks = dict(segment_ids=segment_ids, window=window, causal=causal)
    scores = dict(scale=scale, softcap=softcap, sinks=sinks)
    if implementation == "splash":
        return splash_attention(query, key, value, **masks, **scores)
    if implementation in ("xla", "cudnn"):
        if softcap is not None or sinks is not None:
            lacking = "sinks" if softcap is None else "softcap"
            raise ValueError(
                f"attention: {implementation!r} has no {lacking}; use 'reference' or 'gathered'."
            )
        return _library(query, key, value, **masks, scale=scale, implementation=implementation)
    if implementation == "reference":
        return attend(query, key, value, attention_mask(query.shape[1], **masks), **scores)
    form = {"blocked": _blocked, "tiled": _tiled, "gathered": _gathered}[implementation]
    return form(query, key, value, **masks, **scores)


def attention_mask(
    length: int,
    segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    causal: bool,
    start: int | Int[Array, ""] = 0,
    rows: int | None = None,
) -> Bool[Array, "#B 1 R S"] | None:
    """[1 or B, 1, rows, length], True where a query of `start`..`start + rows` sees a key, or None."""
    rows = length if rows is None else rows
    distance = (jnp.arange(rows) + start)[:, None] - jnp.arange(length)[None, :]
    visible = distance >= 0 if causal else None
    if window is not None:
        inside = (distance < window) & (distance > -window)
        visible = inside if visible is None else visible & inside
    visible = None if visible is None else visible[None, None]
    if segment_ids is not None:
        queries = jax.lax.dynamic_slice_in_dim(segment_ids, start, rows, axis=1)
        same = (queries[:, None, :, None] == segment_ids[:, None, None, :length]) & (
            segment_ids[:, None, None, :length] > 0
        )
        visible = same if visible is None else visible & same
    return visible


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "#B 1 #T S"] | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B T H K"]:
    """The reference, which holds all scores. `mask` is True where a key is visible.

    `bias` is added to the scaled scores.
    """
    grouped = _grouped(query, key.shape[2])
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key, preferred_element_type=jnp.float32)
    weights = weigh(scores, mask, scale, softcap, sinks, bias).astype(value.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, value).reshape(query.shape)


def attend_cache(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B G K S"],
    values: Float[Array, "B G S K"],
    visible: Callable[[int | Int[Array, ""], int], Bool[Array, "#B 1 R S"]],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    bias: Callable[[int | Int[Array, ""], int], Float[Array, "#B H R S"]] | None = None,
) -> Float[Array, "B T H K"]:
    """`attend` for a cache's keys [B, G, K, S] and values [B, G, S, K]: no operand is transposed.

    `visible(i, R)` is the mask of queries i..i + R, `bias(i, R)` what is added to their scaled scores. Only
    `FEW` queries have scores at a time.
    """

    length = query.shape[1]

    def run(carry, start, rows):
        block = jax.lax.dynamic_slice_in_dim(carry, start, rows, axis=1)
        added = None if bias is None else bias(start, rows)
        seen = block, keys, values, visible(start, rows)
        block = _attend_cache(*seen, scale, softcap, sinks, added)
        return _replace(carry, block, start)

    if length <= FEW:
        return run(query, 0, length)
    rest = length % FEW
    starts = jnp.arange(0, length - rest, FEW)
    out, _ = jax.lax.scan(lambda carry, start: (run(carry, start, FEW), None), query, starts)
    return run(out, length - rest, rest) if rest else out


def _attend_cache(query, keys, values, mask, scale, softcap, sinks, bias):
    batch, rows, heads, size = query.shape
    groups = keys.shape[1]
    # The heads of a group are rows of one product with the cache on its right: einsum would put the
    # cache on the left, which is four to ten times slower on XLA:CPU.
    grouped = jnp.moveaxis(_grouped(query, groups), 1, 3)  # [B, G, H/G, T, K]
    left = grouped.reshape(batch, groups, -1, size)
    scores = jnp.matmul(left, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(*grouped.shape[:4], -1)
    weights = weigh(scores, mask, scale, softcap, sinks, bias).astype(values.dtype)
    mixed = jnp.matmul(weights.reshape(*left.shape[:3], -1), values)
    return jnp.moveaxis(mixed.reshape(grouped.shape), 3, 1).reshape(query.shape)


def _replace(x, block, start):
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, axis=1)


def _grouped(query, groups):
    batch, rows, heads, size = query.shape
    return query.reshape(batch, rows, groups, heads // groups, size)


def _masked(scores, mask, scale, softcap, bias=None):
    scores = scores * scale
    if bias is not None:
        scores = scores + bias.astype(scores.dtype).reshape(-1, *scores.shape[1:3], *bias.shape[2:])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # A finite floor: a row with no visible key gives a mean instead of NaN.
        scores = jnp.where(mask[:, :, None], scores, -1e30)
    return scores


def weigh(scores, mask, scale, softcap, sinks=None, bias=None):
    """The weights [B, G, H/G, T, S] of the keys whose products with the queries are `scores`."""
    scores = _masked(scores, mask, scale, softcap, bias)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = _as_scores(sinks, scores.shape[1])
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - top))


def _as_scores(sinks, groups):
    """[1, G, H/G, 1, 1] in float32."""
    return sinks.astype(jnp.float32).reshape(1, groups, -1, 1, 1)


def _best(query, key, segment_ids, window, causal, softcap, sinks) -> Implementation:
    platform, split = target_platform(), length_axes(query.shape[1])
    # Kernels can't be partitioned: several devices need a mesh in context to shard over.
    known = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    if platform == "tpu":
        each = query.shape[1] // attention_layout(query, key).shards
        fits = each >= TILE and not isinstance(window, jax.Array)
        if known and fits:
            return "splash"
    if split:
        return "gathered"
    if platform == "tpu":
        return "reference"
    if platform == "gpu" and sinks is not None:
        # Neither library has them; scores of long rows are not held.
        return "gathered" if query.shape[1] > QUERIES else "reference"
    if platform == "gpu" and softcap is None and query.dtype in (jnp.bfloat16, jnp.float16):
        # None for a program that is compiled elsewhere, too: JAX asks the GPU for its version.
        capability = gpu_capability() or (0, 0)
        most = 256 if capability >= HOPPER else 128 if capability >= AMPERE else 0
        # cuDNN's gradient with a mask needs even lengths, and a two-sided window needs a mask.
        length, size = query.shape[1], query.shape[3]
        takes = size <= most and size % 8 == 0 and length % 2 == 0 and (causal or window is None)
        takes &= known or segment_ids is None
        return "cudnn" if takes else "xla"
    if platform == "cpu" and causal and query.shape[1] > BLOCK:
        return "blocked"
    return "reference"


def _library(query, key, value, segment_ids, window, causal, scale, implementation):
    array = isinstance(window, jax.Array)

    def run(query, key, value, segment_ids, window_array):
        mask, beside, triangle = None, None, causal
        if segment_ids is not None or array:
            width = window_array if array else window
            mask, triangle = attention_mask(query.shape[1], segment_ids, width, causal), False
        elif window is not None:  # local_window_size excludes the query's own key
            beside = (window - 1, 0 if causal else window - 1)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            is_causal=triangle,
            local_window_size=beside,
            implementation=implementation,
        )

    inputs = (query, key, value, segment_ids, window if array else None)
    if implementation == "xla":
        return run(*inputs)
    # JAX splits cuDNN's kernel over a mesh, but not the mask that belongs to it.
    place = attention_layout(query, key)
    if place.length:
        raise ValueError(
            "attention: 'cudnn' needs the tokens of a row on one device; use 'gathered'."
        )
    return place.mapped(run, (*[place.states] * 3, place.tokens, PartitionSpec()))(*inputs)


def _blocked(query, key, value, segment_ids, window, causal, scale, softcap, sinks):
    """The reference over blocks of queries, each against only the keys up to its last row."""
    if not causal:
        raise ValueError("attention: 'blocked' needs causal=True; use 'reference' or 'xla'.")
    length, outputs = query.shape[1], []
    for start in range(0, length, BLOCK):
        rows = min(BLOCK, length - start)
        end = start + rows
        mask = attention_mask(end, segment_ids, window, causal, start, rows)
        seen = query[:, start:end], key[:, :end], value[:, :end]
        outputs.append(attend(*seen, mask, scale=scale, softcap=softcap, sinks=sinks))
    return jnp.concatenate(outputs, axis=1)


def _tiled(query, key, value, segment_ids, window, causal, scale, softcap, sinks):
    """The reference by tiles of queries and keys, in sequence; fully hidden tiles are skipped.

    The state of a tile of queries is Σ exp(s - top) v, Σ exp(s - top) and top, its largest score,
    as in FlashAttention (Dao et al., 2022, arxiv.org/abs/2205.14135, algorithm 1).
    """
    batch, length, heads, size = query.shape
    groups, tile = key.shape[2], BLOCK if target_platform() == "cpu" else QUERIES
    beyond = -length % tile
    if not causal and beyond and segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)  # all except the padding
    pad = lambda x: jnp.pad(x, ((0, 0), (0, beyond)) + ((0, 0),) * (x.ndim - 2))
    query, key, value, segment_ids = jax.tree.map(pad, (query, key, value, segment_ids))
    tiles = jnp.arange(0, length, tile)
    at = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, tile, axis=1)

    # Outputs overwrite their queries: XLA:CPU would allocate empty outputs of all layers in
    # advance.
    def rows(carry, i):
        queries = _grouped(at(carry, i), groups)
        ids = None if segment_ids is None else at(segment_ids, i)

        def add(state, j):
            mixed, total, top = state
            scores = jnp.einsum(
                "btghk,bsgk->bghts", queries, at(key, j), preferred_element_type=jnp.float32
            )
            others = None if segment_ids is None else at(segment_ids, j)
            mask = _tile_mask(i - j, tile, ids, others, window, causal)
            scores = _masked(scores, mask, scale, softcap)
            new = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
            weights, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            part = jnp.einsum(
                "bghts,bsgk->bghtk",
                weights.astype(value.dtype),
                at(value, j),
                preferred_element_type=jnp.float32,
            )
            return mixed * old[..., None] + part, total * old + weights.sum(axis=-1), new

        @jax.checkpoint
        def columns(state, j):
            near = j <= i if causal else True
            if window is not None:
                near &= jnp.abs(i - j) < window + tile - 1
            return jax.lax.cond(near, add, lambda state, j: state, state, j), None

        shape = (batch, groups, heads // groups, tile)
        blank = jnp.zeros((*shape, size)), jnp.zeros(shape), jnp.full(shape, -jnp.inf)
        if sinks is not None:  # each is the first score, of a value of 0
            first = jnp.broadcast_to(_as_scores(sinks, groups)[..., 0], shape)
            blank = blank[0], jnp.ones(shape), first
        (mixed, total, _), _ = jax.lax.scan(columns, blank, tiles)
        out = jnp.moveaxis(mixed / total[..., None], 3, 1).reshape(batch, tile, heads, size)
        return _replace(carry, out, i), None

    return jax.lax.scan(rows, query, tiles)[0][:, :length]


def _tile_mask(offset, tile, ids, others, window, causal):
    """[1 or B, 1, tile, tile] of queries with `ids`, `offset` positions after keys with `others`."""
    distance = offset + jnp.arange(tile)[:, None] - jnp.arange(tile)[None, :]
    visible = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    if window is not None:
        visible &= (distance < window) & (distance > -window)
    visible = visible[None, None]
    if ids is None:
        return visible
    return visible & ((ids[:, :, None] == others[:, None, :]) & (others > 0)[:, None, :])[:, None]


def _gathered(query, key, value, segment_ids, window, causal, scale, softcap, sinks):
    """The queries of each device, in blocks, against all keys, which are gathered over "context".

    Llama 3 was trained this way (Grattafiori et al., 2024, arxiv.org/abs/2407.21783, section
    3.3.2): keys of a few groups are small, and any mask works. The backward pass recomputes scores
    and gathers keys again.
    """
    place = attention_layout(query, key)

    @jax.checkpoint
    def run(query, key, value, segment_ids, window, sinks):
        length = query.shape[1]
        start = jax.lax.axis_index(place.length) * length if place.length else 0
        key, value, segment_ids = jax.tree.map(place.whole, (key, value, segment_ids))
        rows = max(n for n in range(1, QUERIES + 1) if length % n == 0)

        @jax.checkpoint
        def block(carry, i):
            mask = attention_mask(key.shape[1], segment_ids, window, causal, start + i, rows)
            queries = jax.lax.dynamic_slice_in_dim(query, i, rows, axis=1)
            options = dict(scale=scale, softcap=softcap, sinks=sinks)
            return carry, attend(queries, key, value, mask, **options)

        _, blocks = jax.lax.scan(block, None, jnp.arange(0, length, rows))
        return jnp.moveaxis(blocks, 0, 1).reshape(query.shape)

    specs = (*[place.states] * 3, place.tokens, PartitionSpec(), PartitionSpec(place.heads))
    return place.mapped(run, specs)(query, key, value, segment_ids, window, sinks)
