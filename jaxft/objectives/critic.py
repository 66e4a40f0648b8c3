"""A critic for a language model: a value head on its hidden states, and the loss that trains it.

The head is one more leaf of the params, `value_head/{kernel [D, 1], bias [1]}`. It trains together
with the other trained params, is saved in checkpoints, and is removed before the model itself is
saved.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxft import losses
from jaxft.models import Forward
from jaxft.objectives.policy import Auxiliary, Batch, completion_forward
from jaxft.objectives.sharing import of_rows
from jaxft.weights import matmul

Params = Any


def with_value_head(model: Any, params: Params) -> Params:
    """The params with a value head of zeros: V = 0 at first, and the first step changes only the head."""
    kernel = jnp.zeros((model.config.hidden_size, 1))
    return params | {"value_head": {"kernel": kernel, "bias": jnp.zeros(1)}}


def without_value_head(params: Params) -> Params:
    """The params of the model itself, to save and use."""
    return {name: node for name, node in params.items() if name != "value_head"}


def token_values(params: Params, hidden: jax.Array) -> jax.Array:
    """V_t = h_t w + b in float32, [B, N]: the value of the state [B, N, D] in which token t is chosen.

    Raises:
        ValueError: without a value head in the params.
    """
    if "value_head" not in params:
        raise ValueError("token_values: the params have no value_head; see with_value_head.")
    head = params["value_head"]
    return (matmul(hidden.astype(jnp.float32), head["kernel"]) + head["bias"][0])[..., 0]


def value_loss(weight: float = 0.1, clip: float = 0.2, detach: bool = False) -> Auxiliary:
    """c_v ½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²): see `clipped_value_loss`.

    The batch has `old_values` and `returns`, both [B, N]. Its gradient reaches the model below the
    head, unless `detach` is True.

    Args:
        weight: c_v.
        clip: ε; infinity disables it.
        detach: train only the head; the hidden states get no gradient.
    """
    if weight < 0:
        raise ValueError(f"value_loss: weight must be at least 0, got {weight}.")

    def auxiliary(params, hidden, batch):
        hidden = jax.lax.stop_gradient(hidden) if detach else hidden
        values = token_values(params, hidden)
        loss = losses.clipped_value_loss(values, batch["old_values"], batch["returns"], clip=clip)
        return weight * loss, {"value_loss": loss, "value": values}

    return auxiliary


def completion_values(
    forward: Forward,
    params: Params,
    batch: Batch,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log π, V) of the response's tokens, [B, N] each and 0 off the mask, from one forward pass."""
    found, log_probs = completion_forward(forward, params, batch, None, temperature, chunk)
    mask = of_rows(batch)["completion_mask"]
    return log_probs, jnp.where(mask, token_values(params, found.hidden), 0.0)
