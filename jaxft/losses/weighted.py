"""Variants of cross-entropy that weight or soften the loss of each token."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.losses.supervised import cross_entropy

_CERTAIN = -1e-6  # log(1 - p) stays finite in float32 below it


def label_smoothed_cross_entropy(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    *,
    label_smoothing: float = 0.1,
) -> Float[Array, "*batch"]:
    """-(1 - ε) log p(target) - ε / V Σ_v log p(v) in nats, one value per token.

    Szegedy et al., 2015, arxiv.org/abs/1512.00567, section 7, with the uniform distribution.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothed_cross_entropy: label_smoothing must lie in [0, 1), got {label_smoothing}."
        )
    uniform = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
    return (1 - label_smoothing) * cross_entropy(logits, targets) + label_smoothing * uniform


def dft_loss(log_probs: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-sg(p) log p of the target tokens, one value per token: tokens of low probability get little gradient.

    Dynamic fine-tuning: Wu et al., 2025, arxiv.org/abs/2508.05629. `log_probs` are those of the
    targets, as `linear_log_probs` gives them.
    """
    return -jax.lax.stop_gradient(jnp.exp(log_probs)) * log_probs


def unlikelihood_loss(log_probs: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log(1 - p) of tokens to be made unlikely, one value per token; `log_probs` are log p.

    Welleck et al., 2019, arxiv.org/abs/1908.04319, for one candidate per position: the tokens of an
    undesired text.
    """
    return -jax.nn.log1mexp(-jnp.minimum(log_probs, _CERTAIN))


def repetition_unlikelihood(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """-Σ_c log(1 - p(c)) over the distinct earlier targets c of the row, except the current one.

    Welleck et al., 2019, arxiv.org/abs/1908.04319, with the earlier context as candidates.

    Args:
        mask: True where a target is part of the text; only those are candidates and have a loss.
    """
    chex.assert_equal_shape([targets, mask])
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    said = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32) * mask[..., None]
    earlier = jnp.cumsum(said, axis=1) - said
    candidates = (earlier > 0) & (said == 0) & mask[..., None]
    return jnp.sum(jnp.where(candidates, unlikelihood_loss(log_probs), 0.0), axis=-1)
