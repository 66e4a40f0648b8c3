"""Distances between the predictions of two models: logits in, one value per token or example out.

No gradient is stopped: for a fixed target, the caller applies stop_gradient to its logits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BANDWIDTHS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # those of TRAM's code

Kernel = Callable[[jax.Array], jax.Array]  # of a squared distance


def kl_divergence(
    target_logits: Float[Array, "*batch V"], logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """KL(p_target || p) = Σ_v p_target (log p_target - log p) in nats, in float32; the forward form."""
    log_target = jax.nn.log_softmax(target_logits.astype(jnp.float32), axis=-1)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    target = jnp.exp(log_target)
    # Where p_target is 0, log p_target may be -inf; 0 * (-inf - log p) counts as 0.
    ratio = jnp.where(target > 0, log_target - log_p, 0.0)
    return jnp.sum(target * ratio, axis=-1)


def reverse_kl_divergence(
    target_logits: Float[Array, "*batch V"], logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """KL(p || p_target) in nats."""
    return kl_divergence(logits, target_logits)


def symmetric_kl_divergence(
    target_logits: Float[Array, "*batch V"], logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """KL(p_target || p) + KL(p || p_target) in nats: Aghajanyan et al., 2020, arxiv.org/abs/2008.03156."""
    return kl_divergence(target_logits, logits) + kl_divergence(logits, target_logits)


def l2_distance(
    target_logits: Float[Array, "*batch V"], logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """‖logits - target_logits‖ over V, in float32; where they are equal its gradient is 0."""
    difference = logits.astype(jnp.float32) - target_logits.astype(jnp.float32)
    square = jnp.sum(jnp.square(difference), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def maximum_mean_discrepancy(
    target_logits: Float[Array, "*batch V"],
    logits: Float[Array, "*batch V"],
    weights: Float[Array, "*batch"],
    kernel: Kernel | None = None,
) -> Float[Array, "*batch"]:
    """Σ_j w_j (k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)) / Σ_j w_j for each row i.

    x are the target's rows and y the others. The mean over i weighted by w is the squared maximum mean
    discrepancy of the two samples, diagonals included: Gretton et al., 2012, jmlr.org/papers/v13/
    gretton12a.html. Memory is quadratic in the number of rows.

    Args:
        weights: w, at least 0; rows of weight 0 take no part. No gradient.
        kernel: k of squared distances; None: `inverse_multiquadric_kernel()`.
    """
    kernel = inverse_multiquadric_kernel() if kernel is None else kernel
    w = jax.lax.stop_gradient(weights.astype(jnp.float32)).reshape(-1)
    total = jnp.sum(w)
    w = w / jnp.where(total > 0, total, 1.0)
    x, y = (z.astype(jnp.float32).reshape(-1, z.shape[-1]) for z in (target_logits, logits))
    # A common offset would cost distances computed from products their precision.
    center = jax.lax.stop_gradient(w @ x)[None]
    x, y = x - center, y - center
    mean = lambda a, b: kernel(_squared_distances(a, b)) @ w
    return (mean(x, x) + mean(y, y) - mean(x, y) - mean(y, x)).reshape(weights.shape)


def inverse_multiquadric_kernel(bandwidths: tuple[float, ...] = BANDWIDTHS) -> Kernel:
    """s -> Σ_b (b² + s)^(-1/2), the "imq2" and default of TRAM's code."""
    return lambda square: sum(jax.lax.rsqrt(b**2 + square) for b in bandwidths)


def gaussian_kernel(bandwidths: tuple[float, ...] = BANDWIDTHS) -> Kernel:
    """s -> Σ_b exp(-s / 2b), the "rbf" of TRAM's code: b is a variance."""
    return lambda square: sum(jnp.exp(-square / (2 * b)) for b in bandwidths)


def _squared_distances(a, b):
    """[N, M]: |a_i - b_j|²."""
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None]
    return jnp.maximum(squares - 2 * products, 0.0)
