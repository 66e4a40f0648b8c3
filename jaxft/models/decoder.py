"""One transformer decoder for the Llama, Mistral, Qwen, Gemma and GPT-2 families."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attend, attend_cache, attention
from jaxft.models.cache import Cache, cache_mask, empty_cache, reserve, window_mask, write
from jaxft.models.config import DecoderConfig, Rope
from jaxft.models.layers import (
    ACTIVATIONS,
    KERNEL_INIT,
    Dense,
    Embed,
    Norm,
    output_head,
    read,
    through_adapter,
)
from jaxft.models.prediction import Prediction, project
from jaxft.models.remat import Remat, remat_block, remat_lean
from jaxft.models.rope import apply_rope, rope_table
from jaxft.models.soft import (
    ALWAYS_NEAR,
    before,
    check_room,
    lead_mask,
    put_prompt,
    read_lead,
)
from jaxft.models.stacking import is_stacked
from jaxft.parallel import LAYERS
from jaxft.parallel.activations import keep_features, keep_tokens
from jaxft.weights import WeightLike


class Output(NamedTuple):
    """What a decoder gives. Under jit, what is not used is not computed."""

    hidden: jax.Array  # [B, T, D] after the final norm, in the compute dtype
    logits: jax.Array  # [B, T, V] float32
    cache: Cache | None


class LayerKind(NamedTuple):
    """How one layer differs from the next: Python values, or traced ones under a scan."""

    local: bool | jax.Array  # whether it has a window, and so the local rotary table
    window: int | jax.Array | None


class Context(NamedTuple):
    """What all layers share: see `Decoder.__call__` for shapes."""

    segment_ids: jax.Array | None
    positions: jax.Array  # [B, N]: of a prompt, if there is one, and the tokens
    table: Any  # (cos, sin) of the rotary positions, None without
    local_table: Any  # the same for layers with a window
    cache: Cache | None
    start: jax.Array | None  # the slot of the first key; None: the cache was empty
    mask: jax.Array | None  # [B, 1, N, S], windows aside, of virtual tokens without a cache
    key_positions: jax.Array  # [B, S]


class Decoder(nn.Module):
    """tokens -> hidden states and logits.

    Attributes:
        config: the architecture.
        dtype: of activations; params keep theirs and are cast where they are used.
        scan_layers: at init, whether layers are stacked on a leading axis and scanned over
            (`jax.lax.scan`: compile time independent of depth) or kept apart (faster on CPU, and
            each layer can be adapted for itself). Params of either layout can be applied.
        remat: what a backward pass recomputes instead of storing: see jaxft.models.remat.
        attention: implementation of jaxft.kernels.attention; None picks by backend.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        noise: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Output:
        """Runs the decoder.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32, for rotary or learned positions; None: 0..T-1.
            segment_ids: [B, T] int32; tokens see earlier tokens of their segment, 0 is padding.
                None: one segment. With a cache: greater than 0 where a token counts.
            cache: written at its index; its tokens are seen too. Layers must not be stacked. From an empty
                one, attention is as without a cache: windows count tokens, padding included.
            noise: replaces the tokens' embeddings [B, T, D], as they lie in the table, by others.

        A prompt or prefix in the params (see jaxft.models.soft) goes before the tokens, into the cache at
        its first use; positions and the output remain those of the tokens.
        """
        config = self.config
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        lead = read_lead(
            self.variables.get("params", {}),
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            held=0 if cache is None else cache.virtual,
        )
        x = Embed(config.vocab_size, config.hidden_size, name="embed")(tokens, self.dtype)
        x = keep_features(x)
        x = x if noise is None else noise(x)
        x, positions = put_prompt(lead, x, positions, segment_ids if cache is None else None)
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.learned_positions:
            check_room(lead, tokens.shape[1], config.max_length)
            x = x + Embed(config.max_length, config.hidden_size, name="positions")(
                positions, self.dtype
            )
        x = keep_tokens(x)
        context = self._context(lead, positions, segment_ids, cache)
        if self._stacked():
            if cache is not None:
                raise ValueError(
                    "Decoder: a cache needs params with separate layers; "
                    "convert them with jaxft.models.unstack_layers(params)."
                )
            x, new_cache = self._scan(x, context, lead.prefix), None
        else:
            layers = Layers(config, self.remat, self.attention, name=LAYERS)
            x, new_cache = layers(x, context, lead.prefix)
        x = x[:, lead.prompt_length :]
        hidden = Norm(config.norm, config.norm_eps, config.norm_offset, name="final_norm")(x)
        return Output(hidden, self._logits(hidden), new_cache)

    def head(self, params: Any) -> WeightLike:
        """The output projection [D, V] of `params` as a weight."""
        return output_head(params, self.config.tie_embeddings)

    def forward(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: jax.Array | None = None,
        *,
        noise: Callable[[jax.Array], jax.Array] | None = None,
        cache: Cache | None = None,
    ) -> Prediction:
        """The `jaxft.models.Forward` of decoders: reads `tokens`, `positions` and `segment_ids` of a batch.

        Nothing is drawn from `key`: decoders have no dropout. Other columns of the batch are ignored.
        """
        del key
        names = ("positions", "segment_ids")
        inputs = {name: batch.get(name) for name in names}
        output = self.apply(
            {"params": params}, jnp.asarray(batch["tokens"]), cache=cache, noise=noise, **inputs
        )
        softcap = self.config.final_softcap
        return Prediction(output.hidden, self.head(params), softcap, output.cache)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache of `length` slots for `batch` rows; dtype None: that of activations."""
        config = self.config
        dtype = self.dtype if dtype is None else dtype
        return empty_cache(
            config.num_layers, batch, length, config.num_kv_heads, config.head_dim, dtype
        )

    def example_input(self) -> jax.Array:
        """The smallest input, for `init` and shapes."""
        return jnp.zeros((1, 1), jnp.int32)

    def _logits(self, hidden):
        if self.config.tie_embeddings:
            params = {"embed": {"embedding": self.variables["params"]["embed"]["embedding"]}}
        else:
            kernel = OutputKernel(self.config, name="head")()
            params = {"head": {"kernel": kernel}}
        return project(hidden, self.head(params), self.config.final_softcap)

    def _stacked(self) -> bool:
        params = self.variables.get("params", {})
        return self.scan_layers if LAYERS not in params else is_stacked(params)

    def _context(self, lead, positions, segment_ids, cache):
        config, start, mask = self.config, None, None
        table = functools.partial(_table, positions=positions, head_dim=config.head_dim)
        key_positions = before(jnp.full((lead.prefix_length,), ALWAYS_NEAR), positions)
        if cache is not None:
            valid = jnp.ones(key_positions.shape, bool)
            if segment_ids is not None:
                valid = valid.at[:, -segment_ids.shape[1] :].set(segment_ids > 0)
            segment_ids = None if segment_ids is None else valid.astype(jnp.int32)
            # With virtual tokens in front, distances are not those between slots.
            start = None if cache.empty and not lead.length else cache.index
            cache = reserve(cache, key_positions, valid, lead.length)
        elif lead.length:
            mask = lead_mask(lead, segment_ids, positions.shape[1] - lead.prompt_length)
        tables = table(config.rope), table(config.local_rope or config.rope)
        return Context(segment_ids, positions, *tables, cache, start, mask, key_positions)

    def _scan(self, x, context, prefix):
        config = self.config
        local = jnp.array([config.window(i) is not None for i in range(config.num_layers)])
        windows = None
        if config.shared_window is None and any(config.windows):
            # A window longer than any input hides nothing: one program serves all layers.
            windows = jnp.array([config.window(i) or 2**30 for i in range(config.num_layers)])
        scanned = nn.scan(
            remat_block(Block, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )
        body = scanned(config, self.remat, self.attention, name=LAYERS)
        return body(x, LayerKind(local, windows), prefix, None, context)[0]


class Layers(nn.Module):
    """The blocks one after the other, each with its own params."""

    config: DecoderConfig
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(self, x, context, prefix):
        config, keys, values = self.config, [], []
        # A window known while tracing lets attention pick a kernel.
        block_type = remat_block(Block, self.remat, static_argnums=(2,))
        for i in range(config.num_layers):
            block = block_type(config, self.remat, self.attention, name=str(i))
            own = None if prefix is None else prefix[i]
            layer, cached = LayerKind(config.window(i) is not None, config.window(i)), None
            if context.cache is not None:
                cached = (context.cache.keys[i], context.cache.values[i])
            x, cached = block(x, layer, own, cached, context)
            if cached is not None:
                keys.append(cached[0])
                values.append(cached[1])
        if context.cache is None:
            return x, None
        return x, dataclasses.replace(context.cache, keys=tuple(keys), values=tuple(values))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream and added to it."""

    config: DecoderConfig
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(self, x, layer, prefix, cached, context):
        config = self.config
        norm_type = remat_lean(Norm, self.remat)
        norm = functools.partial(norm_type, config.norm, config.norm_eps, config.norm_offset)
        y = norm(name="attention_norm")(x)
        mix = Attention(config, self.remat, self.attention, name="attention")
        y, cached = mix(y, layer, prefix, cached, context)
        x = keep_tokens(x + (norm(name="post_attention_norm")(y) if config.post_norms else y))
        y = Mlp(config, self.remat, name="mlp")(norm(name="mlp_norm")(x))
        x = keep_tokens(x + (norm(name="post_mlp_norm")(y) if config.post_norms else y))
        return x, cached


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
        query = dense(heads * size, name="query")(x)
        key = dense(groups * size, name="key")(x)
        value = dense(groups * size, name="value")(x)
        if config.qk_norm:
            norm_type = remat_lean(Norm, self.remat)
            norm = functools.partial(norm_type, "rms", config.norm_eps, config.norm_offset)
            query = norm(name="query_norm")(split(query)).reshape(query.shape)
            key = norm(name="key_norm")(split(key)).reshape(key.shape)
        options = {"scale": config.scale, "softcap": config.attention_softcap}
        table = None if config.rope is None else _layer_table(config, layer, context)

        # From flat projections: heads narrower than a TPU's lanes would be stored padded.
        def to_heads(query, key, value):
            query, key, value = split(query), split(key), split(value)
            if table is not None:
                query, key = apply_rope(query, table), apply_rope(key, table)
            if prefix is not None:
                key, value = before(prefix[0], key), before(prefix[1], value)
            return query, key, value

        # At init any will do, and a kernel may not run where params are made.
        implementation = None if self.is_initializing() else self.implementation
        window = config.shared_window or layer.window

        def attended(*heads):
            return attention(
                *heads,
                segment_ids=context.segment_ids,
                window=window,
                gradient=cached is None,
                implementation=implementation,
                **options,
            )

        def masked(*heads):
            mask = context.mask
            if window is not None:
                mask = mask & window_mask(context.positions, context.key_positions, window)
            return attend(*heads, mask, **options)

        if cached is None:
            plain = attended if context.mask is None else masked
            run = remat_lean(lambda *projections: plain(*to_heads(*projections)), self.remat)
            y = run(query, key, value)
        else:
            query, key, value = to_heads(query, key, value)
            first = 0 if context.start is None else context.start
            cached = write(cached, key, value, first)
            if context.start is None:
                y = attended(query, key, value)
            else:
                stored = (c.astype(query.dtype) for c in cached)
                y = attend_cache(query, *stored, self._visible(context, prefix, window), **options)
        y = Dense(config.hidden_size, config.output_bias, name="out")(y.reshape(*x.shape[:-1], -1))
        return through_adapter(self, x, y), cached

    def _visible(self, context, prefix, window):
        """The masks of `attend_cache`: the queries' slots come after those of a prefix, if it is new."""
        start = context.start + (0 if prefix is None else prefix.shape[1])

        def visible(i, rows):
            positions = jax.lax.dynamic_slice_in_dim(context.positions, i, rows, axis=1)
            return cache_mask(context.cache, start + i, positions, window)

        return visible


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


class OutputKernel(nn.Module):
    """Holds the output projection of models whose embeddings are not tied."""

    config: DecoderConfig

    @nn.compact
    def __call__(self):
        shape = (self.config.hidden_size, self.config.vocab_size)
        return read(self, "kernel", KERNEL_INIT, shape)


def _layer_table(config, layer, context):
    if config.local_rope is None:
        return context.table
    if isinstance(layer.local, bool):
        return context.local_table if layer.local else context.table
    pick = functools.partial(jnp.where, layer.local)
    return jax.tree.map(pick, context.local_table, context.table)


def _table(rope: Rope | None, *, positions, head_dim):
    return None if rope is None else rope_table(rope, head_dim, positions)
