"""Divergences of a student's distribution over tokens from a teacher's, whole or of the likeliest tokens.

The vocabularies of two models with one tokenizer may be padded to different sizes: the ids that only one
of them has are left out, and both distributions are those over the common ids.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.losses.chunked import weighted_sum
from jaxft.losses.supervised import CHUNK, by_device
from jaxft.weights import WeightLike, matmul_float32

NOTHING = -1e30  # the log-prob of no mass; finite, because 0 x infinity would be NaN
# The least mass of the tokens that a teacher does not list: float32 resolves no less of 1 minus the others.
LEAST_TAIL = 2.0**-24


def generalised_jsd(
    logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch U"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, "*batch"]:
    """β KL(p_T || m) + (1 - β) KL(p_S || m), m = β p_T + (1 - β) p_S, in nats, in float32.

    GKD: Agarwal et al., 2023, arxiv.org/abs/2306.13649, eq. 1, with p_S = softmax(logits / τ) of the student
    and p_T of the teacher. β = 0 is the forward KL(p_T || p_S) and β = 1 the reverse KL(p_S || p_T), as in
    TRL's GKDTrainer: the formula itself is 0 at both ends, and tends to β times the one and 1 - β times
    the other there. It is not multiplied by τ². The forward KL has the gradient of the cross-entropy with
    the teacher's probabilities, from which it differs by the teacher's entropy.

    Args:
        logits: of the student.
        teacher_logits: no gradient is stopped. If U differs from V, ids from min(U, V) on are left out.
        beta: β in [0, 1].
        temperature: τ, divides both logits.

    Raises:
        ValueError: for β outside of [0, 1], or a temperature that is not positive.
    """
    check_divergence(beta, temperature)
    size = min(logits.shape[-1], teacher_logits.shape[-1])
    log_p, log_t = (_log_probs(x[..., :size], temperature) for x in (logits, teacher_logits))
    return _divergence(log_p, log_t, beta)


def top_k_jsd(
    logits: Float[Array, "*batch V"],
    ids: Int[Array, "*batch K"],
    log_probs: Float[Array, "*batch K"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, "*batch"]:
    """`generalised_jsd` of K + 1 events: each token that the teacher lists, and any other token.

    The mass that the teacher does not list, 1 - Σ_k p_T, is compared with the student's mass of all
    tokens that are not listed: nothing is renormalised. Joining events never increases a divergence, so
    this is a lower bound of the whole one; it equals the whole one if all V tokens are listed.

    Args:
        logits: of the student; divided by the temperature here.
        ids: the teacher's tokens, distinct at each position. One outside of the vocabulary, or with a
            log-prob of -infinity, counts as not listed.
        log_probs: their log-probs in nats, already at the temperature.

    Raises:
        ValueError: as `generalised_jsd`.
    """
    check_divergence(beta, temperature)
    log_p, size = _log_probs(logits, temperature), logits.shape[-1]
    there = (ids >= 0) & (ids < size) & jnp.isfinite(log_probs)
    log_t = jnp.where(there, log_probs.astype(jnp.float32), NOTHING)
    picked = jnp.take_along_axis(log_p, jnp.clip(ids, 0, size - 1), axis=-1)
    listed = _listed(jnp.where(there, ids, size), size)
    # Not 1 - Σ_k p_S, whose logarithm loses all digits where the student agrees with the teacher.
    others = jax.nn.logsumexp(jnp.where(listed, NOTHING, log_p), axis=-1, keepdims=True)
    rest = jnp.maximum(1.0 - jnp.sum(jnp.exp(log_t), axis=-1, keepdims=True), LEAST_TAIL)
    rest = jnp.where(jnp.all(listed, axis=-1, keepdims=True), NOTHING, jnp.log(rest))
    student = jnp.concatenate([jnp.where(there, picked, NOTHING), others], axis=-1)
    return _divergence(student, jnp.concatenate([log_t, rest], axis=-1), beta)


def linear_jsd(
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    teacher_hidden: Float[Array, "B T E"],
    teacher_head: WeightLike,
    weights: Float[Array, "B T"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """sum_t w_t `generalised_jsd` of the logits h_t W and the teacher's, never holding those of all tokens.

    The teacher gets no gradient. Tokens of weight 0 are skipped, and the gradient is formed in the
    forward pass: see `weighted_sum`.

    Args:
        hidden, head, softcap: of the student: see `linear_cross_entropy`.
        teacher_hidden, teacher_head, teacher_softcap: of the teacher, for the same tokens.
        weights: w, at least 0; gets no gradient.
        chunk: tokens of each row whose logits are in memory at once, of both models in float32.

    Returns: the weighted sum, in nats; divide by sum(weights) for the mean.
    """
    check_divergence(beta, temperature)

    def value(heads, hidden, teacher_hidden):
        logits = _logits(hidden, heads[0], softcap)
        teacher_logits = _logits(teacher_hidden, heads[1], teacher_softcap)
        return generalised_jsd(logits, teacher_logits, beta=beta, temperature=temperature)

    heads = head, jax.lax.stop_gradient(teacher_head)
    return weighted_sum(value, hidden, heads, (teacher_hidden,), weights, chunk=chunk)


def linear_top_k_jsd(
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    ids: Int[Array, "B T K"],
    log_probs: Float[Array, "B T K"],
    weights: Float[Array, "B T"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """sum_t w_t `top_k_jsd` of the logits h_t W, never holding those of all tokens: see `linear_jsd`."""
    check_divergence(beta, temperature)

    def value(head, hidden, ids, log_probs):
        logits = _logits(hidden, head, softcap)
        return top_k_jsd(logits, ids, log_probs, beta=beta, temperature=temperature)

    return weighted_sum(value, hidden, head, (ids, log_probs), weights, chunk=chunk)


def linear_top_log_probs(
    hidden: Float[Array, "B T D"],
    head: WeightLike,
    k: int,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """(ids, log-probs) of the k likeliest tokens at each position, by chunks of `chunk` tokens per row.

    Raises:
        ValueError: for k outside of 1..V, or a temperature that is not positive.
    """
    if not 1 <= k <= head.shape[-1]:
        raise ValueError(f"linear_top_log_probs: k must lie in 1..{head.shape[-1]}, got {k}.")
    check_divergence(0.0, temperature)

    def run(hidden, head):
        rows, length = hidden.shape[:2]
        size = min(chunk, length)
        parts = jnp.pad(hidden, ((0, 0), (0, -length % size), (0, 0)))
        parts = jnp.moveaxis(parts.reshape(rows, -1, size, hidden.shape[2]), 1, 0)
        top = lambda h: jax.lax.top_k(_log_probs(_logits(h, head, softcap), temperature), k)
        whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, k)[:, :length]
        return tuple(map(whole, jax.lax.map(top, parts)))

    log_probs, ids = by_device(run, hidden, head)
    return ids, log_probs


def check_divergence(beta: float, temperature: float) -> None:
    """Raises ValueError for a beta outside of [0, 1], or a temperature that is not positive and finite."""
    if not 0 <= beta <= 1:
        raise ValueError(
            f"distillation: beta must lie in [0, 1], got {beta}; 0 is the forward KL, 1 the reverse."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"distillation: temperature must be positive and finite, got {temperature}."
        )


def _listed(ids, size):
    """[..., size]: which tokens are among the ids [..., K]; ids from `size` on are dropped."""
    flat = ids.reshape(-1, ids.shape[-1])
    found = jnp.zeros((flat.shape[0], size), bool)
    found = found.at[jnp.arange(flat.shape[0])[:, None], flat].set(True, mode="drop")
    return found.reshape(*ids.shape[:-1], size)


def _logits(hidden, head, softcap):
    logits = matmul_float32(hidden, head)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _log_probs(logits, temperature):
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _divergence(log_p, log_t, beta):
    if beta == 0:
        return _kl(log_t, log_p)
    if beta == 1:
        return _kl(log_p, log_t)
    # Both are -infinity where neither has mass, at which the gradient of logaddexp is NaN.
    log_p, log_t = jnp.maximum(log_p, NOTHING), jnp.maximum(log_t, NOTHING)
    mixture = jnp.logaddexp(log_t + math.log(beta), log_p + math.log1p(-beta))
    return beta * _kl(log_t, mixture) + (1 - beta) * _kl(log_p, mixture)


def _kl(log_p, log_q):
    p = jnp.exp(log_p)
    # Where p is 0, its log may be -inf; 0 * (-inf - log q) counts as 0.
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0), axis=-1)
