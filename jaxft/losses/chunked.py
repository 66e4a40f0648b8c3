"""Weighted sums over tokens of a value of their logits, chunk by chunk, with the gradient formed at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.kernels.pullback import as_varying, of_wanted, pick, with_pullback
from jaxft.parallel.axes import length_axes, row_axes

# (heads, hidden [B, chunk, D], *columns [B, chunk, ...]) -> a value of each token, [B, chunk] float32
Value = Callable[..., jax.Array]


def weighted_sum(
    value: Value,
    hidden: Float[Array, "B T D"],
    heads: Any,
    columns: Sequence[jax.Array],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """sum_t w_t value(heads, h_t, *columns_t), without holding the logits of all tokens at once.

    The gradient is formed in the forward pass, chunk by chunk, so that the logits are computed once;
    tokens of weight 0 are skipped: each row's counted tokens are moved to its front and the loop
    ends after the row with the most. Computing gradients in the forward pass follows Liger Kernel
    (Hsu et al., 2024, arxiv.org/abs/2410.10989, section 3.2).

    Args:
        value: a function of single tokens.
        hidden: states; they get a gradient.
        heads: a pytree of output projections, arrays or weights; what is trained gets a gradient.
        columns: further arrays [B, T, ...] of the tokens, without gradient.
        weights: w, at least 0; without gradient.
        chunk: tokens of each row that `value` gets at once.
    """
    run = functools.partial(_weighted_sum, value, chunk=chunk)
    columns = tuple(jax.lax.stop_gradient(jnp.asarray(x)) for x in columns)
    rows, length = row_axes(hidden.shape[0]), length_axes(hidden.shape[1])
    axes = (*rows, *length)
    if not axes:
        return run(hidden, heads, columns, weights)
    # Each device processes its own tokens; the head is gathered once and its gradient summed once.
    # XLA by itself would do both for every chunk.
    tokens, whole = PartitionSpec(rows, length), PartitionSpec()
    sums = jax.shard_map(
        lambda *arguments: run(*arguments, axes=axes)[None],
        in_specs=(tokens, whole, tokens, tokens),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
        check_vma=False,
    )(hidden, heads, columns, weights)
    return jnp.sum(sums)


def _weighted_sum(value, hidden, heads, columns, weights, *, chunk, axes=()):
    order, count = _front(weights)
    if axes:  # the same number on every device
        count = jax.lax.pmax(count, axes)

    def gather(x):
        indices = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, indices, axis=1)

    weights = jax.lax.stop_gradient(gather(weights).astype(jnp.float32))
    length = weights.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    widen = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    parts = (widen(gather(hidden)), widen(weights), *(widen(gather(x)) for x in columns))
    return _fused(value, parts, heads, count, chunk)


def _front(weights):
    """(order [B, T] with each row's counted tokens first, [] the fullest row's count)."""
    counted = weights > 0
    order = jnp.argsort(~counted, axis=1, stable=True)
    return order, jnp.max(jnp.sum(counted, axis=1))


def _fused(value, tokens, heads, count, chunk):
    """sum_t w_t value_t over chunks of T, up to the one that contains token number `count`."""
    leaves, structure = jax.tree.flatten(heads)

    def part(*args):
        hidden, weights, *columns = args[: len(tokens)]
        heads = structure.unflatten(args[len(tokens) :])
        return jnp.sum(weights * value(heads, hidden, *columns))

    def plain(count, *args):
        del count  # tokens beyond it have the weight 0
        split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
        chunks, leaves = tuple(map(split, args[: len(tokens)])), args[len(tokens) :]
        one = jax.checkpoint(lambda xs: part(*xs, *leaves))
        add = lambda total, xs: (total + one(xs), None)
        start = as_varying([jnp.zeros((), jnp.float32), *chunks, *leaves])[0]
        return jax.lax.scan(add, start, chunks)[0]

    def pullback(wanted, args, gradients, cotangent):
        return [(g * cotangent).astype(g.dtype) for g in gradients]

    forward = functools.partial(_loop, part, chunk, len(tokens))
    return with_pullback(plain, forward, pullback)(count, *tokens, *leaves)


def _loop(part, chunk, size, wanted, count, *args):
    """(sum, [its gradient for each wanted argument: hidden and leaves of the heads]) over chunks.

    The first `size` arguments have tokens. A leaf of the heads that is not differentiated has no gradient
    here, whatever its data type.
    """
    wanted = wanted[1:]
    # Inside a shard_map devices add up their own, and JAX sums them once at the end.
    args = as_varying(args)
    tokens, leaves = args[:size], args[size:]
    empty = [
        jnp.zeros_like(tokens[0]),
        *[None] * (size - 1),
        *(jnp.zeros(w.shape, jnp.float32) for w in leaves),
    ]

    def body(state):
        index, total, found = state
        start = index * chunk
        cut = [jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in tokens]
        own = (*cut, *leaves)
        value, pull = jax.vjp(of_wanted(part, wanted, own), *pick(wanted, own))
        gradients = list(pull(jnp.ones_like(value)))
        if wanted[0]:
            gradients[0] = jax.lax.dynamic_update_slice_in_dim(
                found[0], gradients[0], start, axis=1
            )
        added = [
            a + g.astype(a.dtype)
            for a, g in zip(found[wanted[0] :], gradients[wanted[0] :], strict=True)
        ]
        return index + 1, total + value, [*gradients[: wanted[0]], *added]

    zeros = as_varying([jnp.zeros((), jnp.float32), *pick(wanted, empty), *args])
    start = (jnp.zeros((), jnp.int32), zeros[0], zeros[1 : 1 + sum(wanted)])
    # Counted in chunks: XLA treats a loop in steps of `chunk` to a smaller constant `count` as
    # empty.
    chunks = -(-count // chunk)
    _, total, found = jax.lax.while_loop(lambda s: s[0] < chunks, body, start)
    return total, [g.astype(w.dtype) for g, w in zip(found, pick(wanted, args), strict=True)]
