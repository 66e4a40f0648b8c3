"""Losses of the routers in mixtures of experts, one value per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def expert_load(
    chosen: Int[Array, "L B T k"], mask: Float[Array, "B T"], *, experts: int
) -> tuple[Float[Array, " E"], Float[Array, ""]]:
    """(tokens that pass each expert, tokens), both summed over layers: f_e = load_e / tokens sums to k.

    Args:
        chosen: the k experts of each token in the L layers that have experts.
        mask: 1 for tokens that count, 0 for padding.
        experts: their number, E.
    """
    layers = chosen.shape[0]
    weights = jnp.broadcast_to(mask[None, ..., None], chosen.shape).astype(jnp.float32)
    load = jnp.zeros(experts, jnp.float32).at[chosen.reshape(-1)].add(weights.reshape(-1))
    return load, layers * jnp.sum(mask.astype(jnp.float32))


def balance_loss(
    router_logits: Float[Array, "L B T E"], share: Float[Array, " E"]
) -> Float[Array, "B T"]:
    """E Σ_e f_e p_e(t), whose mean over tokens is least, k, if all experts get as many: p is the softmax.

    Switch Transformer: Fedus et al., 2021, arxiv.org/abs/2101.03961, eq. 4, with f over all layers and k
    experts per token, as in transformers' `load_balancing_loss_func`.

    Args:
        router_logits: of the L layers with experts; the loss is their mean.
        share: f, the share of a batch's tokens that pass each expert (`expert_load`); it gets no gradient.
    """
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    weighted = probabilities * jax.lax.stop_gradient(share)[None, None, None]
    return len(share) * jnp.mean(jnp.sum(weighted, axis=-1), axis=0)


def router_z_loss(router_logits: Float[Array, "L B T E"]) -> Float[Array, "B T"]:
    """(log Σ_e exp z_e)², the mean over layers: keeps the routers' logits small.

    ST-MoE: Zoph et al., 2022, arxiv.org/abs/2202.08906, eq. 5.
    """
    z = jax.nn.logsumexp(router_logits.astype(jnp.float32), axis=-1)
    return jnp.mean(z**2, axis=0)
