"""The layers of encoder-decoders: self-attention, attention to the source, MLP."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attend, attend_cache, attention, attention_mask
from jaxft.models.blocks import Mlp
from jaxft.models.cache import Cache, cache_mask, write
from jaxft.models.encoder_decoder_config import StackConfig
from jaxft.models.layers import Dense, Norm, through_adapter
from jaxft.models.remat import Remat, remat_block, remat_lean
from jaxft.parallel.activations import keep_tokens

Pair = tuple[jax.Array, jax.Array]  # keys [B, H, K, S] and values [B, H, S, K] of a layer


class Context(NamedTuple):
    """The inputs that all layers of a stack share; those after `bias` are the decoder's."""

    segment_ids: jax.Array | None  # [B, T]
    bias: jax.Array | None = None  # [1, H, T, keys], added to the scores of self-attention
    memory: jax.Array | None = None  # [B, S, D] of the encoder; None: in the cache
    sees: jax.Array | None = (
        None  # [B, 1, T or 1, S]: the source tokens that an answer's tokens see
    )
    cache: Cache | None = None
    start: jax.Array | None = None  # slot of the first key; None: the cache was empty


class Stack(nn.Module):
    """The layers of an encoder or decoder, in sequence.

    Returns (x, keys and values of a cache, keys and values of the source), the last two () without a cache.
    """

    config: StackConfig
    decodes: bool = False
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(self, x, context, cached, crossed):
        block, own, source = remat_block(Layer, self.remat), [], []
        at = lambda pairs, i: pairs[i] if pairs else None
        for i in range(self.config.num_layers):
            layer = block(self.config, self.decodes, self.remat, self.attention, name=str(i))
            x, (kept, read) = layer(x, at(cached, i), at(crossed, i), context)
            own.append(kept)
            source.append(read)
        kept = lambda pairs: () if pairs[0] is None else tuple(pairs)
        return x, kept(own), kept(source)


class Layer(nn.Module):
    """Self-attention, in a decoder attention to the source, and MLP, each with a norm and a residual."""

    config: StackConfig
    decodes: bool = False
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(self, x, cached, source, context):
        config = self.config
        norm_type = remat_lean(Norm, self.remat)
        norm = lambda name: norm_type(config.norm, config.norm_eps, name=name)
        into = lambda norm, x: norm(x) if config.pre_norm else x
        out = lambda norm, x: keep_tokens(x) if config.pre_norm else norm(keep_tokens(x))
        first, last = norm("attention_norm"), norm("mlp_norm")
        mix = SelfAttention(config, self.decodes, self.remat, self.attention, name="attention")
        y, kept = mix(into(first, x), cached, context)
        x = out(first, x + y)
        if self.decodes:
            middle = norm("cross_norm")
            # The first call with a cache keeps the source's keys and values.
            attend_to = CrossAttention(config, cached is not None, self.remat, name="cross")
            y, source = attend_to(into(middle, x), source, context)
            x = out(middle, x + y)
        x = out(last, x + Mlp(config, self.remat, name="mlp")(into(last, x)))
        return x, (kept, source)


class SelfAttention(nn.Module):
    """Attention among the tokens of a sequence, with a relative bias or none."""

    config: StackConfig
    causal: bool
    remat: Remat = "none"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, cached, context):
        config = self.config
        query, key, value = _projections(config, ("query", "key", "value"), (x, x, x))
        split = functools.partial(_heads, config)
        length = x.shape[1]
        # At init any implementation works, but a kernel may not run on the device that makes the params.
        implementation = None if self.is_initializing() else self.implementation

        def attended(query, key, value):
            query, key, value = split(query), split(key), split(value)
            if context.bias is None:
                return attention(
                    query,
                    key,
                    value,
                    segment_ids=context.segment_ids,
                    causal=self.causal,
                    scale=config.scale,
                    gradient=cached is None,
                    implementation=implementation,
                )
            mask = attention_mask(length, context.segment_ids, None, self.causal)
            return attend(query, key, value, mask, scale=config.scale, bias=context.bias)

        if cached is None:
            y = remat_lean(attended, self.remat)(query, key, value)
        else:
            first = 0 if context.start is None else context.start
            cached = write(cached, split(key), split(value), first)
            if context.start is None:
                y = attended(query, key, value)
            else:
                y = _from_cache(config, split(query), cached, context)
        y = Dense(config.hidden_size, config.bias, name="out")(y.reshape(*x.shape[:-1], -1))
        return through_adapter(self, x, y), cached


class CrossAttention(nn.Module):
    """Attention of the answer's tokens to the encoder's output, or to its keys and values in a cache."""

    config: StackConfig
    keeps: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, source, context):
        config, memory = self.config, context.memory
        split = functools.partial(_heads, config)
        if memory is None:
            (query,) = _projections(config, ("query",), (x,))
            stored = (c.astype(x.dtype) for c in source)
            visible = lambda i, rows: context.sees
            y = attend_cache(split(query), *stored, visible, scale=config.scale)
        else:
            query, key, value = _projections(config, ("query", "key", "value"), (x, memory, memory))
            attended = lambda q, k, v: attend(
                split(q), split(k), split(v), context.sees, scale=config.scale
            )
            y = remat_lean(attended, self.remat)(query, key, value)
            if self.keeps:
                source = (
                    jnp.transpose(split(key), (0, 2, 3, 1)),
                    jnp.swapaxes(split(value), 1, 2),
                )
        y = Dense(config.hidden_size, config.bias, name="out")(y.reshape(*x.shape[:-1], -1))
        return through_adapter(self, x, y), source


def _projections(config, names, inputs):
    width = config.num_heads * config.head_dim
    bias = lambda name: config.bias and (config.key_bias or name != "key")
    pairs = zip(names, inputs, strict=True)
    return [Dense(width, bias(name), name=name)(x) for name, x in pairs]


def _heads(config, y):
    return y.reshape(*y.shape[:-1], config.num_heads, config.head_dim)


def _from_cache(config, query, cached, context):
    """Attention to the cached keys and values of earlier tokens, and to the queries' own."""
    cache, start, bias = context.cache, context.start, None
    # Positions only matter for windows, which these layers have not.
    visible = lambda i, rows: cache_mask(cache, start + i, jnp.zeros((1, rows), jnp.int32))
    if context.bias is not None:
        bias = lambda i, rows: jax.lax.dynamic_slice_in_dim(context.bias, i, rows, axis=2)
    stored = (c.astype(query.dtype) for c in cached)
    return attend_cache(query, *stored, visible, scale=config.scale, bias=bias)
