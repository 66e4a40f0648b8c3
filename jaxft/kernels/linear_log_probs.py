"""Log-probs of target tokens under a projection onto a vocabulary, without the logits of all tokens.

Two facts make this cheap. First, the gradient of a token's log-prob with respect to its hidden
state depends only on that token, so the forward pass forms it while the logits are available, and
the backward pass only multiplies it by the cotangent: with a frozen head, no logit is computed
twice. Second, given each token's normaliser, the gradient of a column of the head depends only on
that column's logits, so the backward pass processes the vocabulary in tiles and accumulates nothing
in memory.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.kernels import linear_log_probs_tpu as tpu
from jaxft.kernels.pullback import as_varying, with_pullback

Implementation = Literal["reference", "xla", "pallas"]
# Products of fewer tokens with a head are memory-bound on a TPU v5e and on an H100.
FEWEST = 64  # tokens of a row in memory at once: on a mesh a device may hold a single row
TOKENS = 1024  # tokens, over all rows, whose logits are in memory at once in the forward pass
TILE = 2048  # columns of the head whose logits, of all tokens, the backward pass holds at once


def fused_log_probs(
    hidden: Float[Array, "*batch T D"],
    head: Float[Array, "rows columns"],
    targets: Int[Array, "*batch T"],
    *,
    transposed: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch T"]:
    """x_t[target_t] - logsumexp_v x_t[v], x_t = cap(h_t W) / temperature, in nats and float32.

    d/dh_t = s_t (W[:, target_t] - Σ_v p_t[v] W[:, v]) is stored in the forward pass; d/dW is formed
    from recomputed logits. Recomputing logits in tiles from each token's normaliser follows Wijmans
    et al., 2024, arxiv.org/abs/2411.09009, section 4 (without their filter, which drops small
    gradients); the online normaliser of "pallas" is Milakov and Gimelshein's, 2018,
    arxiv.org/abs/1805.02867, algorithm 3.

    Args:
        hidden: h, states after the final norm.
        head: W [D, V], or [V, D] if `transposed` (tied embeddings).
        targets: token ids; one outside the vocabulary gives NaN.
        transposed: how the head is stored; neither form copies it.
        temperature: positive, divides the capped logits.
        softcap: c of cap(z) = c tanh(z / c). None: no cap.
        chunk: "xla": tokens of each row whose logits are in memory at once in the forward pass.
            None: 1024 over all rows, but at least 64 per row.
        implementation: "reference" forms all logits. "xla" processes chunks of tokens forward and
            tiles of the vocabulary backward, and may be partitioned over a mesh (tiles of a trained
            head are gathered over an axis that splits its vocabulary). "pallas" keeps logits in a
            TPU core's own memory; under a mesh it must be called in a shard_map. None: "xla".
        interpret: run "pallas" step by step, on any backend.

    Raises:
        ValueError: if shapes don't fit, or for a temperature, cap, chunk or implementation out of range.
    """
    implementation = "xla" if implementation is None else implementation
    _check(hidden, head, targets, transposed, temperature, softcap, chunk, implementation)
    if implementation == "reference":
        log_probs = _reference(hidden, head, targets, transposed, temperature, softcap)
    else:
        options = _Options(
            transposed, temperature, softcap, chunk, implementation == "pallas", interpret
        )
        log_probs = _log_probs(hidden, head.astype(hidden.dtype), targets, options)
    vocabulary = head.shape[0 if transposed else 1]
    return jnp.where((targets >= 0) & (targets < vocabulary), log_probs, jnp.nan)


class _Options(NamedTuple):
    transposed: bool
    temperature: float
    softcap: float | None
    chunk: int | None
    pallas: bool
    interpret: bool

    @property
    def vocabulary_axis(self) -> int:
        return 0 if self.transposed else 1


def _reference(hidden, head, targets, transposed, temperature, softcap):
    head = (head.T if transposed else head).astype(hidden.dtype)
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    logits = tpu.scaled(logits, temperature, softcap)[0]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _log_probs(hidden, head, targets, options):
    plain = lambda *args: _forward_xla(*args, options, wants=False)[0]
    forward = functools.partial(_log_probs_forward, options)
    pullback = functools.partial(_log_probs_pullback, options)
    return with_pullback(plain, forward, pullback)(hidden, head, targets)


def _log_probs_forward(options, wanted, *args):
    log_probs, normaliser, direction = _forward(*args, options, wants=wanted[0])
    return log_probs, (direction, normaliser if wanted[1] else None)


def _log_probs_pullback(options, wanted, args, residuals, cotangent):
    direction, normaliser = residuals
    if wanted[0]:
        yield (cotangent[..., None] * direction).astype(direction.dtype)
    if wanted[1]:
        yield _backward_head(*args, normaliser, cotangent, options)


def _forward(hidden, head, targets, options, wants):
    """(log-probs, normalisers, d log-prob / d hidden or None)."""
    if not options.pallas:
        return _forward_xla(hidden, head, targets, options, wants)
    shape, features = targets.shape, hidden.shape[-1]
    results = tpu.forward(
        hidden.reshape(-1, features), head, targets.reshape(-1), wants,
        transposed=options.transposed, temperature=options.temperature, softcap=options.softcap,
        interpret=options.interpret,
    )  # fmt: skip
    log_probs, normaliser, direction = results
    direction = direction.reshape(hidden.shape) if wants else None
    return log_probs.reshape(shape), normaliser.reshape(shape), direction


def _backward_head(hidden, head, targets, normaliser, cotangent, options):
    if not options.pallas:
        return _backward_head_xla(hidden, head, targets, normaliser, cotangent, options)
    flat = (x.reshape(-1) for x in (targets, normaliser, cotangent))
    return tpu.backward_head(
        hidden.reshape(-1, hidden.shape[-1]), head, *flat,
        transposed=options.transposed, temperature=options.temperature, softcap=options.softcap,
        interpret=options.interpret,
    )  # fmt: skip


def _forward_xla(hidden, head, targets, options, wants):
    length, rows = targets.shape[-1], targets.size // max(targets.shape[-1], 1)
    chunk = max(FEWEST, -(-TOKENS // max(rows, 1))) if options.chunk is None else options.chunk
    chunk, axis = max(min(chunk, length), 1), targets.ndim - 1
    vocabulary = jnp.arange(head.shape[options.vocabulary_axis])

    # Second derivatives differentiate this function and recompute its logits.
    @jax.checkpoint
    def part(start, hidden, head):
        h, target = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis) for x in (hidden, targets))
        logits, slope = _logits(h, head, options)
        hit = target[..., None] == _along(vocabulary, logits)
        # jax.nn.logsumexp also handles infinities, which costs one percent of the time on a TPU.
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        normaliser = largest + jnp.log(total)
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        if not wants:
            return picked - normaliser, normaliser
        d_logits = (hit - jnp.exp(logits - normaliser[..., None])) * slope
        across = ((h.ndim - 1,), (options.vocabulary_axis,))
        direction = jax.lax.dot_general(d_logits.astype(h.dtype), head, (across, ((), ())))
        return picked - normaliser, normaliser, direction

    def body(i, results):
        # The last chunk overlaps the one before: tokens are independent, and nothing is padded.
        start = jnp.minimum(i * chunk, length - chunk)
        parts = part(start, hidden, head)
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
        return [put(*pair) for pair in zip(results, parts, strict=True)]

    # Every entry is written, so no initial values are needed.
    empty = [jax.lax.empty(targets.shape, jnp.float32)] * 2
    empty += [jax.lax.empty(hidden.shape, hidden.dtype)] * wants
    empty = as_varying([*empty, hidden, head, targets])[: len(empty)]
    results = jax.lax.fori_loop(0, -(-length // chunk), body, empty)
    return (*results, None)[:3]


def _backward_head_xla(hidden, head, targets, normaliser, cotangent, options):
    axis = options.vocabulary_axis
    vocabulary = head.shape[axis]
    tile = min(TILE, vocabulary)
    tokens = tuple(range(targets.ndim))

    def body(i, d_head):
        # The last tile overlaps the one before and computes the same gradient there.
        start = jnp.minimum(i * tile, vocabulary - tile)
        logits, slope = _logits(
            hidden, jax.lax.dynamic_slice_in_dim(head, start, tile, axis), options
        )
        hit = targets[..., None] == _along(start + jnp.arange(tile), logits)
        d_logits = (hit - jnp.exp(logits - normaliser[..., None])) * slope
        d_logits = (d_logits * cotangent[..., None]).astype(hidden.dtype)
        pair = (d_logits, hidden) if options.transposed else (hidden, d_logits)
        part = jax.lax.dot_general(*pair, ((tokens, tokens), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(d_head, part, start, axis)

    empty = jax.lax.empty(head.shape, head.dtype)  # every entry is written
    empty = as_varying([empty, hidden, head, targets, normaliser, cotangent])[0]
    return jax.lax.fori_loop(0, -(-vocabulary // tile), body, empty)


def _along(columns, logits):
    return columns.reshape((1,) * (logits.ndim - 1) + (-1,))


def _check(hidden, head, targets, transposed, temperature, softcap, chunk, implementation):
    features = head.shape[1 if transposed else 0]
    if hidden.shape != (*targets.shape, features):
        raise ValueError(
            f"fused_log_probs: hidden {hidden.shape} and targets {targets.shape} don't fit a head "
            f"{head.shape}; expected hidden [..., T, D], targets [..., T] and a head "
            f"{'[V, D]' if transposed else '[D, V]'} (transposed={transposed})."
        )
    for name, value in (("temperature", temperature), ("softcap", softcap), ("chunk", chunk)):
        if value is not None and not value > 0:
            raise ValueError(f"fused_log_probs: {name} must be positive, got {value}.")
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"fused_log_probs: unknown implementation {implementation!r}; "
            f"expected one of {', '.join(get_args(Implementation))}."
        )


def _logits(hidden, head, options):
    """(x, dx / d(h W)), float32."""
    across = ((hidden.ndim - 1,), (1 - options.vocabulary_axis,))
    # Not rounded to bfloat16: that would change a log-prob by up to 0.07 nats.
    logits = jax.lax.dot_general(
        hidden, head, (across, ((), ())), preferred_element_type=jnp.float32
    )
    return tpu.scaled(logits, options.temperature, options.softcap)
