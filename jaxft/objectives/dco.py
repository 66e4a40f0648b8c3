"""Direct coverage optimization: supervised fine-tuning for one right answer among N samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.losses import coverage_weight, dco_loss, dco_step_loss, linear_log_probs
from jaxft.metrics import Mean
from jaxft.models import Forward, predict
from jaxft.objectives.next_token import Objective, shift


def coverage(forward: Forward, num_samples: int) -> Objective:
    """objective(params, batch, key) -> (mean `dco_loss`, metrics): each row's cross-entropy times F(N, p).

    A row is one example: the tokens that `loss_mask` counts are one completion, whose likelihood p
    determines its weight, so rows cannot be packed. The mean is over rows that have a completion.

    Metrics, Means over the same rows: loss; weight, F(N, p); log_prob, log p in nats.

    Args:
        forward: see `supervised`.
        num_samples: N, number of answers that will be sampled; 1 is supervised fine-tuning, with a
            mean over rows instead of tokens.

    Raises:
        ValueError: for num_samples below 1.
    """
    if num_samples < 1:
        raise ValueError(f"coverage: num_samples must be at least 1, got {num_samples}.")

    def objective(params, batch, key):
        targets, weights = shift(batch)
        log_probs = _log_probs(forward, params, batch, key, targets)
        mask = (weights > 0).astype(jnp.float32)
        counted = (jnp.sum(mask, axis=1) > 0).astype(jnp.float32)
        loss = Mean.of(dco_loss(log_probs, mask, num_samples=num_samples), counted)
        log_prob = jnp.sum(mask * log_probs, axis=1)
        metrics = {
            "loss": loss,
            "weight": Mean.of(coverage_weight(log_prob, num_samples), counted),
            "log_prob": Mean.of(log_prob, counted),
        }
        return loss.value, jax.lax.stop_gradient(metrics)

    return objective


def step_coverage(forward: Forward, num_samples: int, num_steps: int) -> Objective:
    """objective(params, batch, key) -> (mean `dco_step_loss` over steps, metrics): for proofs.

    A row is a whole proof; `steps` [B, T] of the batch gives each token's step, 0 to num_steps - 1,
    and is -1 elsewhere. Metrics: loss, a Mean over existing steps.

    Args:
        forward: see `supervised`.
        num_samples: N_eff, the width of the search tree; 1 is supervised fine-tuning.
        num_steps: number of steps of the longest proof.

    Raises:
        ValueError: for num_samples below 1.
    """
    if num_samples < 1:
        raise ValueError(f"step_coverage: num_samples must be at least 1, got {num_samples}.")

    def objective(params, batch, key):
        targets, weights = shift(batch)
        after = jnp.pad(batch["steps"][:, 1:], ((0, 0), (0, 1)))
        steps = jnp.where(weights > 0, after, -1)
        log_probs = _log_probs(forward, params, batch, key, targets)
        losses = dco_step_loss(log_probs, steps, num_samples=num_samples, num_steps=num_steps)
        there = jnp.any(jax.nn.one_hot(steps, num_steps, dtype=bool), axis=1)
        loss = Mean.of(losses, there.astype(jnp.float32))
        return loss.value, jax.lax.stop_gradient({"loss": loss})

    return objective


def _log_probs(forward, params, batch, key, targets):
    found = predict(forward, params, batch, key)
    return linear_log_probs(found.hidden, found.head, targets, softcap=found.softcap)
