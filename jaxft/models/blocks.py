"""The blocks of the decoder."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attend_cache
from jaxft.models.cache import write
from jaxft.models.config import DecoderConfig, LayerShape
from jaxft.models.context import LayerInputs, LayerKind, layer_table
from jaxft.models.delta import DeltaAttention
from jaxft.models.experts import ExpertsMlp
from jaxft.models.latent import LatentAttention
from jaxft.models.layers import ACTIVATIONS, Dense, Norm, read, through_adapter, unit_rms
from jaxft.models.per_layer import PerLayerInput
from jaxft.models.remat import Remat, remat_block, remat_lean
from jaxft.models.rope import apply_rope
from jaxft.models.soft import before
from jaxft.parallel.activations import keep_tokens
from jaxft.parallel.axes import length_axes
from jaxft.weights import to_dense

TOKENS = 512  # of each row of a prompt that pass an MLP at once


class Layers(nn.Module):
    """The blocks in sequence, each with its own params."""

    config: DecoderConfig
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(self, x, context, prefix, per_layer):
        config, cache, shared = self.config, context.cache, {}
        # If the window is known while tracing, attention can choose a kernel.
        block_type, routed = remat_block(Block, self.remat, static_argnums=(2,)), []
        # Of layers that attend, and of those with a state. One without keys reads those of its source.
        parts, places = None, config.cache_places
        if cache is not None:
            parts = list(zip(cache.keys, cache.values, strict=True)), list(cache.memories)
        for i in range(config.num_layers):
            shape, window, place = config.layer(i), config.window(i), places[i]
            block = block_type(config, self.remat, self.attention, shape, name=str(i))
            layer = LayerKind(window is not None, window, i not in config.unrotated)
            own = LayerInputs(
                None if prefix is None else prefix[i],
                None if per_layer is None else per_layer[:, :, i],
                shared.get(shape.source),
            )
            cached = None if parts is None else parts[shape.recurrent][place]
            x, (cached, heads, routing) = block(x, layer, own, cached, context)
            routed += [] if routing is None else [routing]
            if shape.is_source:
                shared[i] = heads
            if parts is not None:
                parts[shape.recurrent][place] = cached
        routing = jax.tree.map(lambda *parts: jnp.stack(parts), *routed) if routed else None
        if parts is None:
            return x, None, routing
        pairs, memories = parts
        keys, values = zip(*pairs, strict=True) if pairs else ((), ())
        parts = dict(keys=keys, values=values, memories=tuple(memories))
        return x, dataclasses.replace(cache, **parts), routing


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream and added to it.

    Returns (x, (the layer's part of the cache, keys and values of this call if the layer is a source,
    Routing)), each None without them.
    """

    config: DecoderConfig
    remat: Remat
    attention: str | None
    shape: LayerShape

    @nn.compact
    def __call__(self, x, layer, own, cached, context):
        config, sparse = self.config, self.shape.sparse
        norm_type = remat_lean(Norm, self.remat)
        norm = functools.partial(norm_type, config.norm, config.norm_eps, config.norm_offset)
        y = norm(name="attention_norm")(x) if config.pre_norms else x
        options = dict(remat=self.remat, implementation=self.attention, name="attention")
        if self.shape.recurrent:
            mix = DeltaAttention(config, **options)
        elif config.latent is None:
            mix = Attention(config, self.shape, **options)
        else:
            mix = LatentAttention(config, **options)
        y, cached, heads = mix(y, layer, own, cached, context)
        y = norm(name="post_attention_norm")(y) if config.post_norms else y
        x = keep_tokens(x + _scaled(y, config.residual_scale))
        experts = functools.partial(ExpertsMlp, config, self.remat)
        mlp = functools.partial(Mlp, config, self.remat, self.shape.width)

        def add_mlp(x, call):
            y, routing = call(norm, "mlp_norm", x) if config.pre_norms else x, None
            beside = sparse and config.experts.beside
            if sparse and not beside:
                y, routing = call(experts, "mlp", y)
            else:
                y = call(mlp, "mlp", y)
            if beside:  # each part has its norms, and the router reads the residual stream
                z, routing = call(experts, "mixture", call(norm, "experts_norm", x), x)
                y = call(norm, "post_dense_norm", y) + call(norm, "post_experts_norm", z)
            y = call(norm, "post_mlp_norm", y) if config.post_norms else y
            return keep_tokens(x + _scaled(y, config.residual_scale)), routing

        if context.cache is None or x.shape[1] <= TOKENS or length_axes(x.shape[1]):
            x, routing = add_mlp(x, lambda make, name, *xs: make(name=name)(*xs))
        else:
            params = self.variables["params"]
            pure = lambda make, name, *xs: make(parent=None).apply({"params": params[name]}, *xs)
            x, routing = _by_tokens(lambda x: add_mlp(x, pure), x)
        if config.per_layer is not None:
            y = PerLayerInput(config, self.remat, name="per_layer")(x, own.per_layer)
            x = keep_tokens(x + y)
        if config.layer_scales:
            scale = to_dense(read(self, "layer_scale", nn.initializers.ones, (1,)))
            x = x * jax.lax.stop_gradient(scale).astype(x.dtype).reshape((1,) * x.ndim)
        return x, (cached, heads, routing)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary or no positions.

    Returns (y, keys and values of the cache, those [B, S, G, K] of this call if the layer is a source).
    """

    config: DecoderConfig
    shape: LayerShape
    remat: Remat = "none"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, layer, own, cached, context):
        config, shape, prefix = self.config, self.shape, own.prefix
        heads, size, reads = config.num_heads, shape.heads.size, shape.source is not None
        split = lambda y: y.reshape(*y.shape[:-1], -1, size)
        query, key, value, gate = self._projected(x, split)
        options = {"scale": config.scale, "softcap": config.attention_softcap}
        if config.sinks:
            options["sinks"] = to_dense(read(self, "sinks", nn.initializers.zeros, (heads,)))
        table = layer_table(config, layer, context)

        # From flat projections: heads narrower than a TPU's lanes would be stored padded.
        def to_heads(query, key, value):
            turned = lambda y: split(y) if table is None else apply_rope(split(y), table)
            if reads:
                return turned(query), *own.shared
            query, key, value = turned(query), turned(key), split(value)
            if config.value_norm:
                value = unit_rms(value, config.norm_eps)
            if prefix is not None:
                key, value = before(prefix[0], key), before(prefix[1], value)
            return query, key, value

        # At init any implementation works, but a kernel may not run on the device that makes the params.
        implementation = None if self.is_initializing() else self.implementation
        window = config.shared_window or layer.window
        among_tokens = functools.partial(
            context.attend, window=window, implementation=implementation, **options
        )
        if cached is None and not shape.is_source:
            run = lambda *projections: among_tokens(*to_heads(*projections))
            y = remat_lean(run, self.remat)(query, key, value)
        else:
            query, key, value = to_heads(query, key, value)
            if cached is not None and not reads:
                cached = write(cached, key, value, 0 if context.start is None else context.start)
            if cached is None or context.start is None:
                y = among_tokens(query, key, value)
            else:
                stored = (c.astype(query.dtype) for c in cached)
                visible = context.visible(window, 0 if prefix is None else prefix.shape[1])
                y = attend_cache(query, *stored, visible, **options)
        y = y.reshape(*x.shape[:-1], -1)
        if gate is not None:
            y = remat_lean(lambda y, gate: y * jax.nn.sigmoid(gate), self.remat)(y, gate)
        y = Dense(config.hidden_size, config.output_bias, name="out")(y)
        return through_adapter(self, x, y), cached, (key, value) if shape.is_source else None

    def _projected(self, x, split):
        """Queries, keys, values and gates [B, T, H K].

        Keys and values are None in a layer that reads another's, and gates in most models.
        """
        config, shape = self.config, self.shape
        dense = functools.partial(Dense, bias=config.attention_bias)
        size, key, value, gate = shape.heads.size, None, None, None
        query = dense(config.num_heads * size * (2 if config.gated_attention else 1), name="query")(
            x
        )
        if config.gated_attention:  # of each head, the query and then its gate
            both = query.reshape(*x.shape[:-1], config.num_heads, 2 * size)
            query, gate = (part.reshape(*x.shape[:-1], -1) for part in jnp.split(both, 2, axis=-1))
        if shape.source is None:
            key = dense(shape.heads.groups * size, name="key")(x)
            value = key if shape.heads.tied else dense(shape.heads.groups * size, name="value")(x)
        if config.qk_norm:
            norm_type = remat_lean(Norm, self.remat)
            norm = functools.partial(norm_type, "rms", config.norm_eps, config.norm_offset)
            features = (lambda y: y) if config.qk_norm_whole else split
            query = norm(name="query_norm")(features(query)).reshape(query.shape)
            if key is not None:
                key = norm(name="key_norm")(features(key)).reshape(key.shape)
        if config.clip_qkv is not None:
            clip = lambda y: y if y is None else jnp.clip(y, -config.clip_qkv, config.clip_qkv)
            query, key, value = clip(query), clip(key), clip(value)
        return query, key, value, gate


class Mlp(nn.Module):
    """act(x W_gate) * (x W_up) W_down, or act(x W_up) W_down without a gate."""

    config: DecoderConfig
    remat: Remat = "none"
    width: int | None = None  # None: intermediate_size

    @nn.compact
    def __call__(self, x):
        config = self.config
        width = config.intermediate_size if self.width is None else self.width
        dense = functools.partial(Dense, width, config.mlp_bias)
        activation = ACTIVATIONS[config.activation]
        up = dense(name="up")(x)
        if config.gated_mlp:
            gate = dense(name="gate")(x)
            y = remat_lean(lambda g, u: activation(g) * u, self.remat)(gate, up)
        else:
            y = remat_lean(activation, self.remat)(up)
        y = Dense(config.hidden_size, config.mlp_bias, name="down")(y)
        return through_adapter(self, x, y)


def _by_tokens(call, x):
    """call(x) -> (x, more), each [B, T, ...], of a long prompt: its widest values have `TOKENS` at a time."""
    rest = x.shape[1] % TOKENS
    put = lambda x, part, start: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=1)

    # Results overwrite their inputs: XLA:CPU would allocate empty results of all layers in advance.
    def some(x, start, count=TOKENS):
        part, more = call(jax.lax.dynamic_slice_in_dim(x, start, count, axis=1))
        return put(x, part, start), more

    x, more = jax.lax.scan(some, x, jnp.arange(0, x.shape[1] - rest, TOKENS))
    # [blocks, B, TOKENS, ...] as [B, T, ...].
    more = jax.tree.map(lambda m: jnp.moveaxis(m, 0, 1).reshape(x.shape[0], -1, *m.shape[3:]), more)
    if not rest:
        return x, more
    x, last = some(x, x.shape[1] - rest, rest)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), more, last)


def _scaled(x, factor):
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
