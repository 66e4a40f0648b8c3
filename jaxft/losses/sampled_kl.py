"""Estimates of the KL divergence from a reference on policy samples, and a loss with its gradient."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class KlEstimates(NamedTuple):
    """Estimates of KL(π || π_ref), one per sample: Schulman, 2020, "Approximating KL divergence"."""

    k1: jax.Array  # log π - log π_ref: unbiased
    k2: jax.Array  # half its square: biased, never negative
    k3: jax.Array  # π_ref/π - 1 + k1: unbiased, never negative


def kl_estimates(
    log_probs: Float[Array, "*batch"], ref_log_probs: Float[Array, "*batch"]
) -> KlEstimates:
    """k1, k2 and k3 of samples drawn from π."""
    chex.assert_equal_shape([log_probs, ref_log_probs])
    k1 = log_probs - ref_log_probs
    return KlEstimates(k1, 0.5 * k1**2, jnp.expm1(-k1) + k1)


def reverse_kl_surrogate(
    log_probs: Float[Array, " B"],
    ref_log_probs: Float[Array, " B"],
    baseline: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """log π(y) sg(log π(y) - log π_ref(y) - b) for samples y of π: its mean's *gradient* is that of KL.

    Its value is not a KL: see `kl_estimates`. The online term of HyPO: Song et al., 2024,
    arxiv.org/abs/2406.01462.

    Args:
        log_probs: log π(y | x), summed over tokens, of samples at temperature 1.
        ref_log_probs: the same under the reference.
        baseline: b, independent of the sample it belongs to: see `leave_one_out`. None: 0.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    advantage = log_probs - ref_log_probs
    if baseline is not None:
        chex.assert_equal_shape([log_probs, baseline])
        advantage = advantage - baseline
    return log_probs * jax.lax.stop_gradient(advantage)


def leave_one_out(values: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """For each value, the mean of the others of its group: rows i G .. i G + G - 1 are group i.

    The baseline of RLOO: Ahmadian et al., 2024, arxiv.org/abs/2402.14740.

    Raises:
        ValueError: if group_size is below 2 or does not divide the number of rows.
    """
    if group_size < 2 or values.shape[0] % group_size:
        raise ValueError(
            f"leave_one_out: group_size={group_size} for {values.shape[0]} values; it must be at least 2 "
            "and divide their number. Draw more samples per prompt, or use no baseline."
        )
    groups = values.reshape(-1, group_size)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    return others.reshape(-1)
