"""Losses of single completions labelled good or bad, one value per example."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def kto_loss(
    log_ratios: Float[Array, " B"],
    labels: Bool[Array, " B"],
    kl: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, " B"]:
    """λ_D (1 - σ(β (r - z))) where the label is True, λ_U (1 - σ(β (z - r))) where it is False.

    KTO: Ethayarajh et al., 2024, arxiv.org/abs/2402.01306, eq. 7.

    Args:
        log_ratios: r = log π(y | x) - log π_ref(y | x), summed over tokens.
        labels: whether the completion is desirable.
        kl: z, from `kto_kl`; gets no gradient. 0 makes it the unpaired APO-zero.
        desirable_weight, undesirable_weight: λ_D and λ_U. The paper recommends λ_D n_D / (λ_U n_U)
            in [1, 4/3].
    """
    chex.assert_equal_shape([log_ratios, labels])
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(
            f"kto_loss: weights must be at least 0, got {desirable_weight} and {undesirable_weight}."
        )
    z = beta * (log_ratios - jax.lax.stop_gradient(kl))
    loss = 1 - jax.nn.sigmoid(jnp.where(labels, z, -z))
    return jnp.where(labels, desirable_weight, undesirable_weight) * loss


def kto_kl(
    log_ratios: Float[Array, " B"], mask: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """max(0, mean log-ratio) without gradient: KTO's estimate of KL(π || π_ref), its reference point.

    Args:
        log_ratios: of completions of other prompts, log π(y' | x) - log π_ref(y' | x).
        mask: 1 where a row counts; None: everywhere.
    """
    mask = jnp.ones_like(log_ratios) if mask is None else mask
    mean = jnp.sum(mask * log_ratios) / jnp.maximum(jnp.sum(mask), 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def bco_loss(
    log_ratios: Float[Array, " B"],
    labels: Bool[Array, " B"],
    delta: Float[Array, ""],
    *,
    beta: float = 0.1,
    ratios: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """-log σ(β r - δ) where the label is True, -w log σ(-(β r - δ)) where it is False.

    BCO: Jung et al., 2024, arxiv.org/abs/2404.04656.

    Args:
        log_ratios, labels: see `kto_loss`.
        delta: δ, mean of the rewards β r so far; gets no gradient.
        ratios: w, from `density_ratios`; None: 1.
    """
    chex.assert_equal_shape([log_ratios, labels])
    z = beta * log_ratios - jax.lax.stop_gradient(delta)
    loss = -jax.nn.log_sigmoid(jnp.where(labels, z, -z))
    if ratios is None:
        return loss
    chex.assert_equal_shape([log_ratios, ratios])
    return jnp.where(labels, 1.0, ratios) * loss
