"""The scalar head of a reward model: a leaf of the params, `reward/kernel` [D, 1], that no decoder reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models import Forward, Pooling, as_rows, predict
from jaxft.models.checks import check_one_sequence
from jaxft.weights import matmul, to_dense


def add_reward_head(key: jax.Array, params: Any, hidden_size: int, *, bias: bool = False) -> Any:
    """The params with a trainable reward head, normal with variance 1 / (D + 1).

    The head of an encoder has a `bias`, as in transformers' classifiers.
    """
    kernel = jax.random.normal(key, (hidden_size, 1)) / jnp.sqrt(hidden_size + 1.0)
    head = {"kernel": kernel} | ({"bias": jnp.zeros(1)} if bias else {})
    return {**params, "reward": head}


def pair_scores(model: Any) -> Callable[..., jax.Array]:
    """(params, batch, key) -> scores [B] in float32 of a cross-encoder: a model with a reward head.

    A row [B, T] has two texts, and `loss_mask` is above 0 at the tokens of the second. The head reads an
    encoder's pooled first token, or a decoder's last token, as transformers' classifiers do.

    Raises:
        ValueError: for an encoder-decoder, an encoder without a pooler, or params without a reward head.
    """
    check_one_sequence(model, "pair_scores")
    is_encoder = hasattr(model.config, "pooler")
    last = Pooling(("lasttoken",), normalize=False)

    def score(params, batch, key: jax.Array | None = None):
        del key  # The models have no dropout.
        if "reward" not in params or (is_encoder and "pooler" not in params):
            raise ValueError(
                "pair_scores: the params have no 'reward' head or, for an encoder, no 'pooler'; load a "
                "sequence classifier with one label, or see add_reward_head."
            )
        more, segments = {}, batch["segment_ids"]
        if (
            is_encoder and model.config.family == "bert"
        ):  # RoBERTa's tokenizers mark no second text.
            more["token_types"] = (jnp.asarray(batch["loss_mask"]) > 0).astype(jnp.int32)
        tokens = jnp.asarray(batch["tokens"])
        output = model.apply({"params": params}, tokens, segment_ids=segments, **more)
        features = output.pooled if is_encoder else last(output.hidden, segments)
        head = params["reward"]
        scores = matmul(features.astype(jnp.float32), head["kernel"])[:, 0]
        return scores + to_dense(head["bias"])[0] if "bias" in head else scores

    return score


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
