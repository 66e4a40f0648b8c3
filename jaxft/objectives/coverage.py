"""Direct coverage optimization: supervised fine-tuning for one right answer among N samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.losses import coverage_weight, dco_loss, linear_log_probs
from jaxft.metrics import Mean
from jaxft.objectives.supervised import Objective, forward, shift


def coverage(model, num_samples: int) -> Objective:
    """objective(params, batch, key) -> (mean `dco_loss`, metrics): each row's cross-entropy times F(N, p).

    A row is one example: what `loss_mask` counts is one completion, whose likelihood p decides about its
    weight, so rows cannot be packed. The mean is over rows that have a completion.

    Metrics, Means over the same rows: loss; weight, F(N, p); log_prob, log p in nats.

    Args:
        model: a Decoder.
        num_samples: N, how many answers will be sampled; 1 is supervised fine-tuning, with a mean over
            rows rather than tokens.

    Raises:
        ValueError: for num_samples below 1.
    """
    if num_samples < 1:
        raise ValueError(f"coverage: num_samples must be at least 1, got {num_samples}.")

    def objective(params, batch, key):
        del key  # Nothing is drawn: no dropout.
        targets, weights = shift(batch)
        output = forward(model, params, batch)
        softcap = model.config.final_softcap
        log_probs = linear_log_probs(output.hidden, model.head(params), targets, softcap=softcap)
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
