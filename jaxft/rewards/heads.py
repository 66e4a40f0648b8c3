"""The scalar head of a reward model: a leaf of the params, `reward/kernel` [D, 1], that no decoder reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models import Forward, as_rows, predict
from jaxft.weights import matmul


def add_reward_head(key: jax.Array, params: Any, hidden_size: int) -> Any:
    """The params with a trainable reward head, normal with variance 1 / (D + 1)."""
    kernel = jax.random.normal(key, (hidden_size, 1)) / jnp.sqrt(hidden_size + 1.0)
    return {**params, "reward": {"kernel": kernel}}


def token_rewards(
    forward: Forward, params: Any, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> jax.Array:
    """The head's value [B, G, T] at each token, in float32."""
    if "reward" not in params:
        raise ValueError("reward model: the params have no 'reward' head; see add_reward_head.")
    hidden = predict(forward, params, as_rows(batch), key).hidden.astype(jnp.float32)
    return matmul(hidden, params["reward"]["kernel"])[..., 0].reshape(batch["tokens"].shape)


def sequence_rewards(
    forward: Forward, params: Any, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(rewards [B, G] at the last token of each completion, 1 where there is one)."""
    mask = jnp.asarray(batch["loss_mask"]) > 0
    last = mask.shape[2] - 1 - jnp.argmax(mask[..., ::-1], axis=2)
    values = token_rewards(forward, params, batch, key)
    picked = jnp.take_along_axis(values, last[..., None], axis=2)[..., 0]
    return picked, jnp.any(mask, axis=2).astype(jnp.float32)
