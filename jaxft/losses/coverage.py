"""Direct coverage optimization: fine-tuning for at least one right answer among N samples."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SERIES = 0.1  # N p below which the quotient of small numbers is replaced by its series
_LARGEST = 1 - 1e-6  # p: log(1 - p) must stay finite


def coverage_weight(log_probs: Float[Array, "*batch"], num_samples: int) -> Float[Array, "*batch"]:
    """F(N, p) = N (1 - p)^(N-1) p / (1 - (1 - p)^N), in [0, 1], without gradient.

    The gradient of -log(1 - (1 - p)^N) is F times that of -log p: examples that N samples solve
    anyway get no gradient. DCO: Chen et al., 2025, arxiv.org/abs/2502.07154.

    Args:
        log_probs: log p of a whole completion, summed over its tokens.
        num_samples: N; 1 gives weights of 1, that is cross-entropy.
    """
    if num_samples < 1:
        raise ValueError(f"coverage_weight: num_samples must be at least 1, got {num_samples}.")
    if num_samples == 1:
        return jnp.ones_like(log_probs)
    n, p = float(num_samples), jnp.minimum(jnp.exp(jax.lax.stop_gradient(log_probs)), _LARGEST)
    small = n * p < _SERIES
    top = 1 - (n - 1) * p + (n - 1) * (n - 2) * p**2 / 2
    series = top / (1 - (n - 1) * p / 2 + (n - 1) * (n - 2) * p**2 / 6)
    # The branch that is not taken must not divide 0 by 0.
    q = jnp.where(small, 0.5, p)
    exact = n * q * jnp.exp((n - 1) * jnp.log1p(-q)) / -jnp.expm1(n * jnp.log1p(-q))
    return jnp.where(small, series, exact)


def dco_loss(
    log_probs: Float[Array, "B T"], mask: Float[Array, "B T"], *, num_samples: int
) -> Float[Array, " B"]:
    """F(N, p) times the mean of -log p_t over a completion's tokens, one value per example.

    See `coverage_weight`. The authors' code, too, takes the mean and not the sum. For the sum,
    multiply by the number of tokens.

    Args:
        log_probs: of the target tokens.
        mask: 1 on the completion's tokens; each row needs one.
        num_samples: N.
    """
    chex.assert_equal_shape([log_probs, mask])
    total = jnp.sum(mask * log_probs, axis=1)
    mean = -total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
    return coverage_weight(total, num_samples) * mean


def dco_step_loss(
    log_probs: Float[Array, "B T"], steps: Int[Array, "B T"], *, num_samples: int, num_steps: int
) -> Float[Array, "B S"]:
    """`dco_loss` of each step of a row separately: F(N, p_s) times the mean of -log p_t over its tokens.

    For proofs that are searched step by step: N is then the width of the tree, N_eff, and a small
    N_eff makes the search deep and narrow (DCO_step of Chen et al., 2025). Missing steps give 0.

    Args:
        log_probs: of the target tokens.
        steps: the step, 0..S-1, that a token belongs to; any other number for tokens outside the
            steps.
        num_samples: N_eff.
        num_steps: S.
    """
    chex.assert_equal_shape([log_probs, steps])
    member = jax.nn.one_hot(steps, num_steps, dtype=bool)  # [B, T, S]
    total = jnp.sum(jnp.where(member, log_probs[..., None], 0.0), axis=1)
    mean = -total / jnp.maximum(jnp.sum(member, axis=1), 1)
    return coverage_weight(total, num_samples) * mean
