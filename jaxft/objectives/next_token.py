"""Supervised fine-tuning: cross-entropy of the tokens that a mask counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.losses import linear_cross_entropy
from jaxft.metrics import Mean, Terms, Undivided, WholeMean, is_undivided, terms_of
from jaxft.models import Forward, predict
from jaxft.models.checks import check_tokens
from jaxft.objectives.routing import NO_TERMS, RouterTerms, router_terms

Objective = Callable[..., tuple[jax.Array, dict[str, Any]]]


def supervised(
    forward: Forward,
    *,
    chunk: int = 64,
    router: RouterTerms = NO_TERMS,
    label_smoothing: float = 0.0,
) -> Objective:
    """objective(params, batch, key) -> (token-mean cross-entropy in nats, metrics).

    `batch` holds `tokens` [B, T] and, each optional, `loss_mask` [B, T] (weight of each token as a
    target; default 1), `segment_ids` [B, T] (0 is padding) and `positions` [B, T]. The mean is over
    the sum of weights; metrics["loss"] carries it, so that microbatches add up.

    Args:
        forward: a `jaxft.models.Forward`, such as `model.forward` of a Decoder; `with_noise` adds
            noise to its inputs.
        chunk: see `linear_cross_entropy`.
        router: coefficients of the routers' losses of a model with experts, from the same forward; the
            loss is then the sum of the terms (`Terms`). Its metrics are logged in any case.
        label_smoothing: ε in [0, 1): the share of a target's weight that all tokens of the vocabulary get
            alike, as in `torch.nn.CrossEntropyLoss` and transformers' `label_smoothing_factor`.
    """

    def objective(params, batch, key):
        targets, weights = shift(batch)
        found = predict(forward, params, batch, key)
        total = linear_cross_entropy(
            found.hidden,
            found.head,
            targets,
            weights,
            softcap=found.softcap,
            chunk=chunk,
            label_smoothing=label_smoothing,
        )
        loss = Mean(total, jnp.sum(weights))
        terms, metrics = router_terms(found, batch, router)
        if not terms:
            return loss.value, jax.lax.stop_gradient({"loss": loss}) | metrics
        whole = Terms((loss, *terms))
        task = {"cross_entropy": jax.lax.stop_gradient(loss)}
        return whole.value, task | metrics | {"loss": whole}

    return objective


def token_supervised(
    forward: Forward,
    token_loss: Callable[..., jax.Array],
    metrics: Callable[..., dict] | None = None,
) -> Objective:
    """`supervised` with any token_loss(key, logits [B, T, V], targets [B, T], mask [B, T]) -> [B, T].

    For losses that need more than the target's log-prob, such as `otr_loss`: all logits are in
    memory.

    Args:
        metrics: (key, logits, targets) -> {name: [B, T]}, with the key of the loss; logged as
            means.
    """

    def objective(params, batch, key):
        targets, weights = shift(batch)
        logits, count = predict(forward, params, batch, key).logits, jnp.sum(weights)
        loss = Mean(jnp.sum(weights * token_loss(key, logits, targets, weights > 0)), count)
        found = {} if metrics is None else metrics(key, logits, targets)
        found = {name: Mean(jnp.sum(weights * x), count) for name, x in found.items()}
        return loss.value, jax.lax.stop_gradient({"loss": loss} | found)

    return objective


def mean_of(objective: Objective) -> Callable[..., Mean | Terms]:
    """(params, batch, key) -> the loss as a Mean, or Terms, with its gradient, which adds up over slices.

    If the objective has a `WholeMean` or `Undivided` value, the result is `Undivided`: it needs a
    whole batch.
    """

    def mean(params, batch, key):
        loss, metrics = objective(params, batch, key)
        parts = terms_of(loss, metrics["loss"])
        if any(isinstance(m, WholeMean) or is_undivided(m) for m in metrics.values()):
            return Undivided(loss, jnp.ones(()))
        return parts[0] if len(parts) == 1 else Terms(parts)

    return mean


def shift(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(targets [B, T], their weights [B, T] float32): position t predicts token t + 1.

    The weight is 0 at the last position, where t + 1 belongs to another segment, and on padding.

    Raises:
        ValueError: if tokens are not rows [B, T], or loss_mask or segment_ids differ from them in
            shape.
    """
    check_tokens(batch)
    tokens = batch["tokens"]
    after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    weights = after(jnp.asarray(batch.get("loss_mask", jnp.ones(tokens.shape)), jnp.float32))
    if "segment_ids" in batch:
        segments = jnp.asarray(batch["segment_ids"])
        weights = weights * ((segments == after(segments)) & (segments > 0))
    return after(jnp.asarray(tokens)), weights
