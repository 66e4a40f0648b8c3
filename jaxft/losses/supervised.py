"""Cross-entropy, plain and fused with the output projection."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.kernels.linear_log_probs import fused_log_probs
from jaxft.kernels.pullback import as_varying, of_wanted, pick, with_pullback
from jaxft.parallel.axes import length_axes, row_axes
from jaxft.weights import WeightLike, matmul_float32, stored

CHUNK = 64  # tokens per row whose logits are in memory at once


def cross_entropy(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] in nats, one value per token, in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def label_smoothed_cross_entropy(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    *,
    label_smoothing: float = 0.1,
) -> Float[Array, "*batch"]:
    """-(1 - ε) log p(target) - ε / V Σ_v log p(v) in nats, one value per token.

    Szegedy et al., 2015, arxiv.org/abs/1512.00567, section 7, with the uniform distribution. In terms of
    logits x: logsumexp x - (1 - ε) x_target - ε mean_v x_v.

    Raises:
        ValueError: if label_smoothing, which is ε, is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothed_cross_entropy: label_smoothing must lie in [0, 1), got {label_smoothing}."
        )
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    kept = (1 - label_smoothing) * picked + label_smoothing * jnp.mean(logits, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - kept


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float | None = None,
    chunk: int = CHUNK,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """sum_t w_t (-log softmax(h_t W)[target_t]), without holding the logits of all tokens at once.

    The gradient is formed in the forward pass, chunk by chunk, so that the logits are computed once;
    tokens of weight 0 are skipped: each row's counted tokens are moved to its front and the loop
    ends after the row with the most. Computing gradients in the forward pass follows Liger Kernel
    (Hsu et al., 2024, arxiv.org/abs/2410.10989, section 3.2).

    Args:
        hidden: states after the final norm.
        head: the output projection [D, V], an array or a weight; gets a gradient if it is trained.
        targets: token ids; where the weight is 0, any valid id.
        weights: w, at least 0; gets no gradient.
        softcap: c of logits c tanh(h W / c).
        chunk: tokens of each row whose logits (B x chunk x V, float32) are in memory at once.
        label_smoothing: ε of `label_smoothed_cross_entropy`, which then is the loss of a token.

    Returns: the weighted sum, in nats; divide by sum(weights) for the mean.
    """
    loss = cross_entropy
    if label_smoothing:
        loss = functools.partial(label_smoothed_cross_entropy, label_smoothing=label_smoothing)
    run = functools.partial(_weighted_sum, loss=loss, softcap=softcap, chunk=chunk)
    rows, length = row_axes(hidden.shape[0]), length_axes(hidden.shape[1])
    axes = (*rows, *length)
    if not axes:
        return run(hidden, head, targets, weights)
    # Each device processes its own tokens; the head is gathered once and its gradient summed once.
    # XLA by itself would do both for every chunk.
    tokens, whole = PartitionSpec(rows, length), PartitionSpec()
    sums = jax.shard_map(
        lambda *arguments: run(*arguments, axes=axes)[None],
        in_specs=(tokens, whole, tokens, tokens),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
        check_vma=False,
    )(hidden, head, targets, weights)
    return jnp.sum(sums)


def _weighted_sum(hidden, head, targets, weights, *, loss, softcap, chunk, axes=()):
    order, count = _front(weights)
    if axes:  # the same number on every device
        count = jax.lax.pmax(count, axes)
    gather = functools.partial(jnp.take_along_axis, indices=order, axis=1)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    weights = jax.lax.stop_gradient(gather(weights).astype(jnp.float32))
    length = targets.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    widen = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    parts = (widen(hidden), widen(gather(targets)), widen(weights))
    return _fused(loss, *parts, head, count, softcap, chunk)


def linear_log_probs(
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    targets: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """log softmax(h_t W / temperature)[target_t] in nats, one value per token; never holds all logits.

    A caller may weight tokens by values that are known only after the forward pass (advantages,
    preferences). A dense head, frozen or not, uses the kernel `fused_log_probs`; any other weight
    uses `matmul`, chunk by chunk, and recomputes its logits in the backward pass.

    Args:
        chunk: tokens of each row whose logits are in memory at once. None: the form's default.
    """
    dense, transposed = stored(head)
    if dense is not None:
        options = dict(temperature=temperature, softcap=softcap, chunk=chunk)
        run = functools.partial(fused_log_probs, transposed=transposed, **options)
        return _over_length(run, hidden, dense, targets)
    score = lambda logits, targets: -cross_entropy(logits / temperature, targets)
    return scan_logits(score, hidden, head, targets, softcap=softcap, chunk=chunk)


def scan_logits(
    function: Callable[..., jax.Array],
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    *others: jax.Array,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """function(logits [B, chunk, V], others' [B, chunk]) by chunks of T; the backward pass recomputes it."""
    scan = functools.partial(_scan_logits, function, softcap=softcap, chunk=chunk)
    return _over_length(scan, hidden, head, *others)


def _over_length(run, hidden, head, *others):
    """run(hidden, head, *others), with each device of "context" processing its own tokens."""
    axes = length_axes(hidden.shape[1])
    if not axes:
        return run(hidden, head, *others)
    tokens = PartitionSpec(None, axes)
    return jax.shard_map(
        run,
        in_specs=(tokens, PartitionSpec(), *[tokens] * len(others)),
        out_specs=tokens,
        axis_names=set(axes),
        check_vma=False,
    )(hidden, head, *others)


def _scan_logits(function, hidden, head, *others, softcap, chunk):
    rows, length = hidden.shape[:2]
    chunk = min(CHUNK if chunk is None else chunk, length)
    pad = -length % chunk
    widen = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    split = lambda x: jnp.moveaxis(widen(x).reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def part(carry, xs):
        return carry, function(_logits(xs[0], head, softcap), *xs[1:])

    _, values = jax.lax.scan(part, None, tuple(map(split, (hidden, *others))))
    return jnp.moveaxis(values, 0, 1).reshape(rows, -1)[:, :length]


def _front(weights):
    """(order [B, T] with each row's counted tokens first, [] the fullest row's count)."""
    counted = weights > 0
    order = jnp.argsort(~counted, axis=1, stable=True)
    return order, jnp.max(jnp.sum(counted, axis=1))


def _logits(hidden, head, softcap):
    logits = matmul_float32(hidden, head)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _fused(loss, hidden, targets, weights, head, count, softcap, chunk):
    """sum_t w_t loss_t over chunks of T, up to the one that contains token number `count`."""
    leaves, structure = jax.tree.flatten(head)

    def part(hidden, targets, weights, *leaves):
        logits = _logits(hidden, structure.unflatten(leaves), softcap)
        return jnp.sum(weights * loss(logits, targets))

    def plain(count, hidden, targets, weights, *leaves):
        del count  # tokens beyond it have the weight 0
        split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
        one = jax.checkpoint(lambda xs: part(*xs, *leaves))
        chunks = tuple(map(split, (hidden, targets, weights)))
        add = lambda total, xs: (total + one(xs), None)
        start = as_varying([jnp.zeros((), jnp.float32), *chunks, *leaves])[0]
        return jax.lax.scan(add, start, chunks)[0]

    def pullback(wanted, args, gradients, cotangent):
        return [(g * cotangent).astype(g.dtype) for g in gradients]

    fused = with_pullback(plain, functools.partial(_loop, part, chunk), pullback)
    return fused(count, hidden, targets, weights, *leaves)


def _loop(part, chunk, wanted, count, *args):
    """(sum, [its gradient for each wanted argument: hidden and leaves of the head]) over chunks.

    A leaf of the head that is not differentiated has no gradient here, whatever its data type.
    """
    wanted = wanted[1:]
    args = as_varying(
        args
    )  # Inside a shard_map devices add up their own, and JAX sums them once at the end.
    tokens, leaves = args[:3], args[3:]
    empty = [
        jnp.zeros_like(tokens[0]),
        *[None] * 2,
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
