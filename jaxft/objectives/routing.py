"""Terms of a loss that keep the experts of a model evenly used, and the metrics of its routers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.losses import balance_loss, expert_load, router_z_loss
from jaxft.metrics import Mean, WholeMean
from jaxft.models import Prediction


@dataclasses.dataclass(frozen=True)
class RouterTerms:
    """Coefficients of the routers' losses; 0: the loss is only logged.

    Checkpoints name the first in `config.experts.balance` (router_aux_loss_coef). Only routers that train
    need them: adapters freeze routers.
    """

    balance: float = 0.0  # of jaxft.losses.balance_loss; 0.001 to 0.02 are usual
    z: float = 0.0  # of jaxft.losses.router_z_loss; 0.001 is usual

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"RouterTerms: {name} must be at least 0, got {value}.")


NO_TERMS = RouterTerms()


def router_terms(
    found: Prediction, batch: dict[str, Any], coefficients: RouterTerms
) -> tuple[tuple[Mean, ...], dict[str, Mean]]:
    """(terms of the loss, metrics) of a prediction: none for a model without experts.

    Metrics are router/balance and router/z (means over tokens that are not padding, whatever their
    loss_mask), and router/load [E], the number of tokens that pass each expert relative to the mean. The
    load is that of the whole batch, also with microbatches (`WholeMean`).

    Raises:
        ValueError: for a nonzero coefficient of a model without experts.
    """
    if found.routing is None:
        if coefficients != NO_TERMS:
            raise ValueError(f"{coefficients}: this model has no experts; leave the terms out.")
        return (), {}
    logits, chosen = found.routing.logits, found.routing.chosen
    shape, segments = logits.shape[1:3], batch.get("segment_ids")
    real = jnp.ones(shape) if segments is None else (jnp.asarray(segments) > 0).astype(jnp.float32)
    counts, tokens = expert_load(chosen, real, experts=logits.shape[-1])
    even = chosen.shape[-1] / logits.shape[-1]
    load = WholeMean(jax.lax.stop_gradient(counts / even), tokens)
    share = load.over(batch, "router/load").value * even
    balance = Mean.of(balance_loss(logits, share), real)
    z = Mean.of(router_z_loss(logits), real)
    named = ((coefficients.balance, balance), (coefficients.z, z))
    terms = tuple(mean._replace(total=c * mean.total) for c, mean in named if c)
    metrics = {"router/balance": balance, "router/z": z, "router/load": load}
    return terms, jax.lax.stop_gradient(metrics)
