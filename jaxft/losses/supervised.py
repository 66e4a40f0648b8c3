"""Cross-entropy, plain and fused with the output projection."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.kernels.linear_log_probs import fused_log_probs
from jaxft.losses.chunked import weighted_sum
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

    The gradient is formed in the forward pass, and tokens of weight 0 are skipped: see `weighted_sum`.

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
    value = lambda head, hidden, targets: loss(_logits(hidden, head, softcap), targets)
    return weighted_sum(value, hidden, head, (targets,), weights, chunk=chunk)


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
        return by_device(run, hidden, dense, targets)
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
    return by_device(scan, hidden, head, *others)


def by_device(run, hidden, head, *others):
    """run(hidden [B, T, D], head, *others [B, T, ...]), with each device processing its own tokens.

    The head is gathered once and its gradient summed once; XLA by itself would do both for every chunk.
    """
    rows, length = row_axes(hidden.shape[0]), length_axes(hidden.shape[1])
    axes = {*rows, *length}
    if not axes:
        return run(hidden, head, *others)
    tokens = PartitionSpec(rows, length)
    return jax.shard_map(
        run,
        in_specs=(tokens, PartitionSpec(), *[tokens] * len(others)),
        out_specs=tokens,
        axis_names=axes,
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


def _logits(hidden, head, softcap):
    logits = matmul_float32(hidden, head)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
