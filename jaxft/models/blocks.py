"""The blocks of the decoder."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attend_cache
from jaxft.models.cache import write
from jaxft.models.config import DecoderConfig
from jaxft.models.context import LayerKind, layer_table
from jaxft.models.delta import DeltaAttention
from jaxft.models.experts import ExpertsMlp
from jaxft.models.latent import LatentAttention
from jaxft.models.layers import ACTIVATIONS, Dense, Norm, read, through_adapter
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
    def __call__(self, x, context, prefix):
        config, keys, values, memories = self.config, [], [], []
        # If the window is known while tracing, attention can choose a kernel.
        block_type, routed = remat_block(Block, self.remat, static_argnums=(2,)), []
        for i in range(config.num_layers):
            kind = config.has_experts(i), config.has_state(i)
            block = block_type(config, self.remat, self.attention, *kind, name=str(i))
            own = None if prefix is None else prefix[i]
            window, cached = config.window(i), None
            layer = LayerKind(window is not None, window, i not in config.unrotated)
            if context.cache is not None and config.has_state(i):
                cached = context.cache.memories[len(memories)]
            elif context.cache is not None:
                cached = (context.cache.keys[len(keys)], context.cache.values[len(keys)])
            x, (cached, routing) = block(x, layer, own, cached, context)
            routed += [] if routing is None else [routing]
            if cached is not None and config.has_state(i):
                memories.append(cached)
            elif cached is not None:
                keys.append(cached[0])
                values.append(cached[1])
        routing = jax.tree.map(lambda *parts: jnp.stack(parts), *routed) if routed else None
        if context.cache is None:
            return x, None, routing
        parts = dict(keys=tuple(keys), values=tuple(values), memories=tuple(memories))
        cache = dataclasses.replace(context.cache, **parts)
        return x, cache, routing


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream and added to it.

    Returns (x, (the layer's part of the cache, Routing)), each None without them.
    """

    config: DecoderConfig
    remat: Remat = "none"
    attention: str | None = None
    sparse: bool = False  # experts replace the MLP
    recurrent: bool = False  # a Gated DeltaNet replaces attention

    @nn.compact
    def __call__(self, x, layer, prefix, cached, context):
        config = self.config
        norm_type = remat_lean(Norm, self.remat)
        norm = functools.partial(norm_type, config.norm, config.norm_eps, config.norm_offset)
        y = norm(name="attention_norm")(x) if config.pre_norms else x
        kind = Attention if config.latent is None else LatentAttention
        kind = DeltaAttention if self.recurrent else kind
        mix = kind(config, self.remat, self.attention, name="attention")
        y, cached = mix(y, layer, prefix, cached, context)
        y = norm(name="post_attention_norm")(y) if config.post_norms else y
        x = keep_tokens(x + _scaled(y, config.residual_scale))
        make = functools.partial(ExpertsMlp if self.sparse else Mlp, config, self.remat)

        def add_mlp(x, call):
            y = call(norm, "mlp_norm", x) if config.pre_norms else x
            y = call(make, "mlp", y)
            y, routing = y if self.sparse else (y, None)
            y = call(norm, "post_mlp_norm", y) if config.post_norms else y
            return keep_tokens(x + _scaled(y, config.residual_scale)), routing

        if context.cache is None or x.shape[1] <= TOKENS or length_axes(x.shape[1]):
            x, routing = add_mlp(x, lambda make, name, x: make(name=name)(x))
        else:
            params = self.variables["params"]
            pure = lambda make, name, x: make(parent=None).apply({"params": params[name]}, x)
            x, routing = _by_tokens(lambda x: add_mlp(x, pure), x)
        return x, (cached, routing)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary or no positions."""

    config: DecoderConfig
    remat: Remat = "none"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, layer, prefix, cached, context):
        config = self.config
        heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
        split = lambda y: y.reshape(*y.shape[:-1], -1, size)
        dense = functools.partial(Dense, bias=config.attention_bias)
        width = 2 * heads * size if config.gated_attention else heads * size
        query, gate = dense(width, name="query")(x), None
        if config.gated_attention:  # of each head, the query and then its gate
            both = query.reshape(*x.shape[:-1], heads, 2 * size)
            query, gate = (part.reshape(*x.shape[:-1], -1) for part in jnp.split(both, 2, axis=-1))
        key = dense(groups * size, name="key")(x)
        value = dense(groups * size, name="value")(x)
        if config.qk_norm:
            norm_type = remat_lean(Norm, self.remat)
            norm = functools.partial(norm_type, "rms", config.norm_eps, config.norm_offset)
            features = (lambda y: y) if config.qk_norm_whole else split
            query = norm(name="query_norm")(features(query)).reshape(query.shape)
            key = norm(name="key_norm")(features(key)).reshape(key.shape)
        if config.clip_qkv is not None:
            query, key, value = (
                jnp.clip(y, -config.clip_qkv, config.clip_qkv) for y in (query, key, value)
            )
        options = {"scale": config.scale, "softcap": config.attention_softcap}
        if config.sinks:
            options["sinks"] = to_dense(read(self, "sinks", nn.initializers.zeros, (heads,)))
        table = layer_table(config, layer, context)

        # From flat projections: heads narrower than a TPU's lanes would be stored padded.
        def to_heads(query, key, value):
            query, key, value = split(query), split(key), split(value)
            if table is not None:
                query, key = apply_rope(query, table), apply_rope(key, table)
            if prefix is not None:
                key, value = before(prefix[0], key), before(prefix[1], value)
            return query, key, value

        # At init any implementation works, but a kernel may not run on the device that makes the params.
        implementation = None if self.is_initializing() else self.implementation
        window = config.shared_window or layer.window
        among_tokens = functools.partial(
            context.attend, window=window, implementation=implementation, **options
        )
        if cached is None:
            run = lambda *projections: among_tokens(*to_heads(*projections))
            y = remat_lean(run, self.remat)(query, key, value)
        else:
            query, key, value = to_heads(query, key, value)
            cached = write(cached, key, value, 0 if context.start is None else context.start)
            if context.start is None:
                y = among_tokens(query, key, value)
            else:
                stored = (c.astype(query.dtype) for c in cached)
                visible = context.visible(window, 0 if prefix is None else prefix.shape[1])
                y = attend_cache(query, *stored, visible, **options)
        y = y.reshape(*x.shape[:-1], -1)
        if gate is not None:
            y = remat_lean(lambda y, gate: y * jax.nn.sigmoid(gate), self.remat)(y, gate)
        y = Dense(config.hidden_size, config.output_bias, name="out")(y)
        return through_adapter(self, x, y), cached


class Mlp(nn.Module):
    """act(x W_gate) * (x W_up) W_down, or act(x W_up) W_down without a gate."""

    config: DecoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x):
        config = self.config
        dense = functools.partial(Dense, config.intermediate_size, config.mlp_bias)
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
