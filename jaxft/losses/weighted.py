"""Variants of cross-entropy that weight the loss of each token."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_CERTAIN = -1e-6  # log(1 - p) stays finite in float32 below it


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
