"""Pallas TPU kernels of fused_log_probs: logits live in VMEM, one tile of tokens x vocabulary at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
TOKENS = 512  # rows of a tile: each byte read from the head serves this many tokens
COLUMNS = 1024  # columns of a tile, at most
VMEM = 96 * 2**20  # bytes; a v5e or v6e core has 128 MiB


def scaled(logits, temperature, softcap):
    """(x, dx / dlogits) of x = c tanh(logits / c) / temperature."""
    if softcap is None:
        return logits / temperature, 1 / temperature
    bent = jnp.tanh(logits / softcap)
    return softcap / temperature * bent, (1 - bent * bent) / temperature


def forward(
    hidden, head, targets, wants, *, transposed, temperature, softcap, interpret, tokens=TOKENS
):
    """(log-probs [N], normalisers [N], d log-prob / d hidden [N, D] or None) of hidden [N, D].

    Works like flash attention, with the head as keys and values: over the tiles of the vocabulary,
    each token keeps its largest logit m, Σ e^(x - m), and Σ e^(x - m) W[:, v]. Tokens are sorted by
    target first: then few tiles hold targets of a block of tokens, and only those cost a third
    product.
    """
    order = jnp.argsort(targets)
    vocabulary = head.shape[0 if transposed else 1]
    count, features = hidden.shape
    rows, columns = _rows(count, tokens), _columns(vocabulary)
    grid = (pl.cdiv(count, rows), pl.cdiv(vocabulary, columns))
    per_token = pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
    whole = pl.BlockSpec((rows, features), lambda i, j: (i, 0))
    column, number = (
        jax.ShapeDtypeStruct((count, 1), jnp.float32),
        pltpu.VMEM((rows, 1), jnp.float32),
    )
    wide = pltpu.VMEM((rows, features), jnp.float32)
    results = pl.pallas_call(
        functools.partial(
            _forward_kernel, wants=wants, vocabulary=vocabulary, transposed=transposed,
            temperature=temperature, softcap=softcap,
        ),
        grid=grid,
        in_specs=[per_token, whole, _head_spec(features, columns, transposed, lambda i, j: j)],
        out_specs=[per_token, per_token] + [whole] * wants,
        out_shape=[column, column] + [jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)] * wants,
        scratch_shapes=[number] * 3 + [wide] * (2 * wants),
        compiler_params=_params("parallel", "arbitrary"),
        cost_estimate=_cost(
            hidden, head, products=1 + wants,
            moved=(1 + wants) * hidden.nbytes + grid[0] * head.nbytes,
        ),
        interpret=interpret,
    )(targets[order, None], hidden[order], head)  # fmt: skip
    back = jnp.argsort(order)
    log_probs, normaliser, direction = (*(r[back] for r in results), None)[:3]
    return log_probs[:, 0], normaliser[:, 0], direction


def backward_head(
    hidden, head, targets, normaliser, cotangent, *, transposed, temperature, softcap, interpret,
    tokens=TOKENS,
):  # fmt: skip
    """Σ_t g_t d log-prob_t / d head, like the head: for each tile of its columns, over all tokens."""
    vocabulary = head.shape[0 if transposed else 1]
    count, features = hidden.shape
    rows, columns = _rows(count, tokens), _columns(vocabulary)
    # The sum runs over tokens: padding in the last block must be finite, with cotangent 0.
    pad = lambda x: jnp.pad(x, ((0, -count % rows), (0, 0)))
    grid = (pl.cdiv(vocabulary, columns), pl.cdiv(count, rows))
    per_token = pl.BlockSpec((rows, 1), lambda i, j: (j, 0))
    head_spec = _head_spec(features, columns, transposed, lambda i, j: i)
    return pl.pallas_call(
        functools.partial(
            _backward_kernel, transposed=transposed, temperature=temperature, softcap=softcap
        ),
        grid=grid,
        in_specs=[per_token] * 3 + [pl.BlockSpec((rows, features), lambda i, j: (j, 0)), head_spec],
        out_specs=head_spec,
        out_shape=jax.ShapeDtypeStruct(head.shape, head.dtype),
        scratch_shapes=[pltpu.VMEM(head_spec.block_shape, jnp.float32)],
        compiler_params=_params("parallel", "arbitrary"),
        cost_estimate=_cost(
            hidden, head, products=2, moved=2 * head.nbytes + grid[0] * hidden.nbytes
        ),
        interpret=interpret,
    )(*(pad(x[:, None]) for x in (targets, normaliser, cotangent)), pad(hidden), head)


def _forward_kernel(
    targets, hidden, head, log_probs, normaliser, *rest, wants, vocabulary, transposed, temperature, softcap
):  # fmt: skip
    direction, rest = (rest[0], rest[1:]) if wants else (None, rest)
    largest, total, picked, mean, own = (*rest, None, None)[:5]
    tile, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(tile == 0)
    def _():
        largest[...] = jnp.full_like(largest, -jnp.inf)
        for ref in rest[1:]:
            ref[...] = jnp.zeros_like(ref)

    part = head[...]
    columns = part.shape[0 if transposed else 1]
    start = tile * columns
    if vocabulary % columns:  # Memory beyond the head may hold NaN, and 0 times NaN is NaN.
        index = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0 if transposed else 1)
        part = jnp.where(start + index < vocabulary, part, jnp.zeros_like(part))
    logits = _dot(hidden[...], part, 1, 1 if transposed else 0)
    x, slope = scaled(logits, temperature, softcap)
    index = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if vocabulary % columns:
        x = jnp.where(index < vocabulary, x, -jnp.inf)
    hit = index == targets[...]
    new = jnp.maximum(largest[...], jnp.max(x, axis=1, keepdims=True))
    shrink, weights = jnp.exp(largest[...] - new), jnp.exp(x - new)
    largest[...] = new
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    picked[...] += jnp.sum(jnp.where(hit, x, 0.0), axis=1, keepdims=True)
    if wants:
        product = lambda w: _dot((w * slope).astype(part.dtype), part, 1, 0 if transposed else 1)
        mean[...] = mean[...] * shrink + product(weights)

        @pl.when(jnp.any((targets[...] >= start) & (targets[...] < start + columns)))
        def _():
            own[...] += product(hit.astype(jnp.float32))

    @pl.when(tile == last)
    def _():
        normaliser[...] = largest[...] + jnp.log(total[...])
        log_probs[...] = picked[...] - normaliser[...]
        if wants:
            direction[...] = (own[...] - mean[...] / total[...]).astype(direction.dtype)


def _backward_kernel(
    targets, normaliser, cotangent, hidden, head, d_head, total, *, transposed, temperature, softcap
):
    block, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(block == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    x, slope = scaled(_dot(hidden[...], head[...], 1, 1 if transposed else 0), temperature, softcap)
    index = pl.program_id(0) * x.shape[1] + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    hit = (index == targets[...]).astype(jnp.float32)
    d_logits = cotangent[...] * (hit - jnp.exp(x - normaliser[...])) * slope
    d_logits = d_logits.astype(hidden.dtype)
    pair = (d_logits, hidden[...]) if transposed else (hidden[...], d_logits)
    total[...] += _dot(*pair, 0, 0)

    @pl.when(block == last)
    def _():
        d_head[...] = total[...].astype(d_head.dtype)


def _dot(a, b, a_axis, b_axis):
    across = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, across, preferred_element_type=jnp.float32)


def _head_spec(features, columns, transposed, tile):
    if transposed:
        return pl.BlockSpec((columns, features), lambda i, j: (tile(i, j), 0))
    return pl.BlockSpec((features, columns), lambda i, j: (0, tile(i, j)))


def _rows(count, tokens):
    return count if count < tokens else tokens


def _columns(vocabulary):
    """The widest tile of at most COLUMNS that divides the vocabulary, or else one that overhangs it."""
    fits = [n for n in range(LANES, COLUMNS + 1, LANES) if vocabulary % n == 0]
    if fits and fits[-1] >= COLUMNS // 2:
        return fits[-1]
    return min(COLUMNS, vocabulary)


def _params(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)


def _cost(hidden, head, *, products, moved):
    """`products` of all tokens with all of the head, and bytes moved between HBM and VMEM."""
    exponentials = hidden.shape[0] * head.size // hidden.shape[1]
    flops = 2 * products * hidden.shape[0] * head.size
    return pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved)
