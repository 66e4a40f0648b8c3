"""Embeddings of texts from the hidden states of a model: the pooling of sentence-transformers' models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.checks import check_one_sequence

# (params, batch, key) -> embeddings [B, D] in float32, of a batch of rows with one text each.
Embedding = Callable[[Any, Mapping[str, Any], jax.Array | None], jax.Array]


def _sum(hidden, valid):
    return jnp.einsum("btd,bt->bd", hidden, valid.astype(jnp.float32))


def _count(valid):
    return jnp.maximum(jnp.sum(valid.astype(jnp.float32), axis=1, keepdims=True), 1e-9)


def _at(hidden, places):
    return jnp.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]


def _last(valid):
    return valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)


def _weighted(hidden, valid):
    """SGPT (Muennighoff, 2022, arxiv.org/abs/2202.08904): the i-th token of a text has the weight i."""
    weights = jnp.cumsum(valid, axis=1) * valid
    return _sum(hidden, weights) / _count(weights)


# By sentence-transformers' names. Padding may be on either side.
POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": lambda hidden, valid: _sum(hidden, valid) / _count(valid),
    "cls": lambda hidden, valid: _at(hidden, jnp.argmax(valid, axis=1)),
    "max": lambda hidden, valid: jnp.max(
        jnp.where(valid[..., None], hidden, jnp.finfo(jnp.float32).min), axis=1
    ),
    "mean_sqrt_len_tokens": lambda hidden, valid: _sum(hidden, valid) / jnp.sqrt(_count(valid)),
    "weightedmean": _weighted,
    "lasttoken": lambda hidden, valid: _at(hidden, _last(valid)),
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """A function of hidden states [B, T, D] to embeddings [B, D].

    Attributes:
        modes: of POOLINGS; the features of several are put side by side, in this order.
        normalize: whether the result is scaled to unit length.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = True

    def __post_init__(self):
        if not self.modes or (odd := [mode for mode in self.modes if mode not in POOLINGS]):
            raise ValueError(
                f"Pooling: unknown modes {odd if self.modes else '()'}; known: {', '.join(POOLINGS)}."
            )

    def __call__(self, hidden: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """The embeddings [B, D x modes] in float32; tokens with a segment id of 0 are padding."""
        hidden = hidden.astype(jnp.float32)
        shape = hidden.shape[:2]
        valid = jnp.ones(shape, bool) if segment_ids is None else jnp.asarray(segment_ids) > 0
        found = jnp.concatenate([POOLINGS[mode](hidden, valid) for mode in self.modes], axis=-1)
        return unit(found) if self.normalize else found


MEAN = Pooling()


def unit(x: jax.Array) -> jax.Array:
    """x [..., D] scaled to unit length; 0 stays 0, with a gradient of 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def mean_pool(
    hidden: jax.Array, segment_ids: jax.Array | None = None, *, normalize: bool = True
) -> jax.Array:
    """[B, D]: the mean of the hidden states [B, T, D] without padding, scaled to unit length.

    Equals the sentence embeddings of sentence-transformers (Reimers & Gurevych, 2019,
    arxiv.org/abs/1908.10084).
    """
    return Pooling(("mean",), normalize)(hidden, segment_ids)


def embedding_of(model: Any, pooling: Pooling = MEAN) -> Embedding:
    """The embedding function of an Encoder or Decoder: the pooled hidden states of each row's text.

    It reads `tokens` and `segment_ids` [B, T] of a batch. A decoder sees earlier tokens only, so pool its
    "lasttoken".

    Raises:
        ValueError: for an encoder-decoder.
    """
    check_one_sequence(model, "embedding_of")

    def embed(params, batch, key: jax.Array | None = None):
        del key  # The models have no dropout.
        segments = batch.get("segment_ids")
        tokens = jnp.asarray(batch["tokens"])
        output = model.apply({"params": params}, tokens, segment_ids=segments)
        return pooling(output.hidden, segments)

    return embed
