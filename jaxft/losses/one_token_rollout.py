"""One-token rollouts: each position of supervised fine-tuning as a one-step bandit."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.keys import stream
from jaxft.losses.supervised import cross_entropy


def otr_loss(
    key: jax.Array,
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    num_samples: int = 256,
    kappa: float = 1.3,
    beta: float = -0.1,
) -> Float[Array, "B T"]:
    """-1/K Σ_j R_j log π(a_j), a_j from softmax(logits / κ), R_j = 1 for the target and β for others.

    One-token rollout: Ming et al., 2025, arxiv.org/abs/2509.26313. REINFORCE without baseline or
    importance weights; log π is at temperature 1, and only log π gets a gradient.

    Args:
        key: combined with each row's index, so that samples depend on the row's place in the batch.
        mask: True where a target counts; elsewhere the loss is 0.
        num_samples: K.
        kappa: κ, temperature of the samples.
        beta: β, reward of tokens that are not the target, below 0.
    """
    _check(kappa, beta)
    chex.assert_equal_shape([targets, mask])
    logits = logits.astype(jnp.float32)
    shares = _drawn_shares(key, logits, num_samples, kappa)
    return jnp.where(mask, _policy_loss(logits, targets, shares, beta), 0.0)


def otr_metrics(
    key: jax.Array,
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    *,
    num_samples: int = 256,
    kappa: float = 1.3,
) -> dict[str, Float[Array, "B T"]]:
    """Metrics per position of the samples of `otr_loss` with the same key; jit draws them only once.

    `hit_rate`: share of samples that are the target; `missed`: 1 where none is, so that every
    reward there is β; `entropy` of π in nats.
    """
    _check(kappa, 0.0)
    logits = jax.lax.stop_gradient(logits.astype(jnp.float32))
    hits = _at(_drawn_shares(key, logits, num_samples, kappa), targets)
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return {"hit_rate": hits, "missed": (hits == 0) * 1.0, "entropy": entropy}


def otr_expected_loss(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    *,
    kappa: float = 1.3,
    beta: float = -0.1,
) -> Float[Array, "*batch"]:
    """`otr_loss` for infinitely many samples: no noise, and no cost beyond the logits.

    With q = softmax(logits / κ), c_v = q_v for the target and β q_v for others: -Σ_v c_v log π(v). For κ = 1
    and β = 0 it is `dft_loss`.
    """
    _check(kappa, beta)
    logits = logits.astype(jnp.float32)
    shares = jax.nn.softmax(jax.lax.stop_gradient(logits) / kappa, axis=-1)
    return _policy_loss(logits, targets, shares, beta)


def _drawn_shares(key, logits, num_samples, kappa):
    """[B, T, V]: the share of each token among K draws, each row with its own key."""
    if num_samples < 1:
        raise ValueError(f"otr_loss: num_samples must be at least 1, got {num_samples}.")

    def counts(key, logits):
        # From the CDF: K uniforms per position, where K draws of `categorical` would need K V
        # Gumbels.
        cdf = jnp.cumsum(jax.nn.softmax(logits / kappa, axis=-1), axis=-1)
        u = jax.random.uniform(key, (*logits.shape[:-1], num_samples)) * cdf[..., -1:]
        drawn = jax.vmap(lambda c, x: jnp.searchsorted(c, x, side="right"))(cdf, u)
        # u may round up to the last value of the CDF.
        drawn = jnp.minimum(drawn, logits.shape[-1] - 1)
        add = lambda row: jnp.zeros(logits.shape[-1]).at[row].add(1.0)
        return jax.vmap(add)(drawn)

    rows = jax.vmap(functools.partial(stream, key, "row"))(jnp.arange(logits.shape[0]))
    return jax.vmap(counts)(rows, jax.lax.stop_gradient(logits)) / num_samples


def _policy_loss(logits, targets, shares, beta):
    """-Σ_v shares_v R_v log π(v), all V at once: R is 1 for the target and β for others."""
    picked = _at(shares, targets)
    everything = jnp.sum(shares * jax.nn.log_softmax(logits), axis=-1)
    return (1 - beta) * picked * cross_entropy(logits, targets) - beta * everything


def _at(values, targets):
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


def _check(kappa, beta):
    if not kappa > 0:
        raise ValueError(f"otr: kappa must be positive, got {kappa}; the paper's is 1.3.")
    if beta > 1:
        raise ValueError(f"otr: beta must be at most 1, the target's reward, got {beta}.")
