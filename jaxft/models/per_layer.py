"""Inputs of the layers from the tokens themselves: per-layer embeddings, as in Gemma 3n and 4.

A second table has a row for each token, with a part for each layer. The sum of that part and of a projection
of the token's embedding is an input of the layer, beside the residual stream.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.models.config import DecoderConfig
from jaxft.models.layers import ACTIVATIONS, Dense, Embed, Norm
from jaxft.models.remat import Remat, remat_lean
from jaxft.parallel.activations import keep_features, keep_tokens


class PerLayerEmbeddings(nn.Module):
    """(norm(x W D^-1/2) + sqrt(P) E[token]) / sqrt(2), [B, T, L, P], for embedded tokens x [B, T, D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens, x):
        config, own = self.config, self.config.per_layer
        width = config.num_layers * own.size
        scaled = lambda y, factor: y * jnp.asarray(factor, y.dtype)
        parts = lambda y: y.reshape(*y.shape[:-1], config.num_layers, own.size)
        rows = keep_features(Embed(own.vocab_size, width, name="embed")(tokens, x.dtype))
        rows = parts(keep_tokens(scaled(rows, own.size**0.5)))
        projected = scaled(Dense(width, name="projection")(x), config.hidden_size**-0.5)
        norm = Norm(config.norm, config.norm_eps, config.norm_offset, name="norm")
        return scaled(norm(parts(projected)) + rows, 2**-0.5)


class PerLayerInput(nn.Module):
    """norm((act(x W_gate) * own) W_down) for the residual stream x [B, T, D] and own [B, T, P]."""

    config: DecoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: jax.Array, own: jax.Array) -> jax.Array:
        config = self.config
        activation = ACTIVATIONS[config.activation]
        gate = Dense(config.per_layer.size, name="gate")(x)
        y = remat_lean(lambda gate, own: activation(gate) * own, self.remat)(gate, own)
        y = Dense(config.hidden_size, name="down")(y)
        norm = functools.partial(remat_lean(Norm, self.remat), config.norm, config.norm_eps)
        return norm(config.norm_offset, name="norm")(y)
