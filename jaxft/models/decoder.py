"""One transformer decoder for all families that predict the next token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.branches import Branches
from jaxft.models.blocks import Block, Layers
from jaxft.models.cache import Cache, empty_cache, reserve
from jaxft.models.config import DecoderConfig, Rope, embeddings_column
from jaxft.models.context import Context, LayerInputs, LayerKind
from jaxft.models.delta import check_lead, empty_memories
from jaxft.models.experts import Routing
from jaxft.models.grid_positions import grid_positions, next_positions
from jaxft.models.layers import (
    KERNEL_INIT,
    Embed,
    Norm,
    output_head,
    read,
)
from jaxft.models.per_layer import PerLayerEmbeddings
from jaxft.models.prediction import Prediction, project
from jaxft.models.prefixes import prefix_masks, prefix_of
from jaxft.models.remat import Remat, remat_block
from jaxft.models.rope import rope_table, text_lengths
from jaxft.models.soft import (
    before,
    check_room,
    check_virtual,
    lead_mask,
    put_prompt,
    read_lead,
    virtual_tokens,
)
from jaxft.models.stacking import is_stacked
from jaxft.models.vision import put_embeddings
from jaxft.parallel import LAYERS
from jaxft.parallel.activations import keep_features, keep_tokens
from jaxft.weights import WeightLike


class Output(NamedTuple):
    """The result of a decoder. Under jit, unused fields are not computed."""

    # [B, T, D] that the head multiplies: after the final norm, in the compute dtype
    hidden: jax.Array
    logits: jax.Array  # [B, T, V] float32
    cache: Cache | None
    routing: Routing | None = None  # of the layers with experts


class Decoder(nn.Module):
    """tokens -> hidden states and logits.

    Attributes:
        config: the architecture.
        dtype: of activations; params keep theirs and are cast where they are used.
        scan_layers: at init, whether layers are stacked on a leading axis and scanned over
            (`jax.lax.scan`: compile time independent of depth) or kept separate (faster on CPU, and
            each layer can be adapted on its own). Params of either layout can be applied.
        remat: the values that a backward pass recomputes instead of storing: see jaxft.models.remat.
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
        branches: Branches | None = None,
        media: Mapping[str, jax.Array] | None = None,
        prefix: jax.Array | None = None,
    ) -> Output:
        """Runs the decoder.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32, for rotary or learned positions; None: 0..T-1.
            segment_ids: [B, T] int32; tokens see earlier tokens of their segment, 0 is padding.
                None: one segment. With a cache: greater than 0 for tokens that count.
            cache: written at its index; queries also see its tokens. Layers must not be stacked.
                With an empty cache, attention is as without a cache: windows count tokens,
                including padding.
            noise: a function that replaces the tokens' embeddings [B, T, D] (unscaled, as in the table).
            branches: the layout of rows in which several texts continue one: see `Branches`. A row has one
                segment, and `positions` are those of its texts.
            media: the columns [B, M, ...] of images or audio that `config.towers` read. A tower whose
                columns are absent is not run; nor is one whose outputs are given (`embeddings_column`).
            prefix: [B, T], the tokens that see each other in both directions, of a config with
                `prefix_attention`; None: all tokens. Later tokens of a cache see those before.

        A prompt or prefix in the params (see jaxft.models.soft) is put before the tokens, and into the cache
        at its first use; positions and the output are those of the tokens.
        """
        config = self.config
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        check_virtual(config, self.variables.get("params", {}))
        lead = read_lead(
            self.variables.get("params", {}),
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            held=0 if cache is None else cache.virtual,
        )
        if config.delta is not None:
            check_lead(lead)
        x = Embed(config.vocab_size, config.hidden_size, name="embed")(tokens, self.dtype)
        x = keep_features(x)
        x = x if noise is None else noise(x)
        x = self._with_media(x, tokens, media or {})
        grid = self._grid(lead, tokens, segment_ids, media or {}, cache)
        positions = positions if grid is None else grid[0] - lead.length
        x, positions = put_prompt(lead, x, positions, segment_ids if cache is None else None)
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.learned_positions:
            check_room(lead, tokens.shape[1], config.max_length)
            x = x + Embed(config.max_length, config.hidden_size, name="positions")(
                positions, self.dtype
            )
        x = keep_tokens(x)
        per_layer = None
        if config.per_layer is not None:
            per_layer = PerLayerEmbeddings(config, name="per_layer")(tokens, x)
        if branches is not None and (
            why := self.branch_obstacle(self.variables.get("params"), held=cache)
        ):
            raise ValueError(
                f"branches: completions cannot share a prompt: {why}; use a row for each completion."
            )
        context = self._context(lead, positions, segment_ids, cache, grid)._replace(
            branches=branches
        )
        if config.prefix_attention and (cache is None or cache.empty):
            if lead.length:
                raise ValueError(
                    f"{config.family}: soft prompts and prefixes are not supported where a prompt's tokens "
                    "see each other in both directions; use LoRA."
                )
            prefix = jnp.ones(tokens.shape, bool) if prefix is None else prefix
            mask, opened = prefix_masks(prefix, context.segment_ids)
            context = context._replace(mask=mask, opened=opened)
        if self._stacked():
            if cache is not None:
                raise ValueError(
                    "Decoder: a cache needs params with separate layers; "
                    "convert them with jaxft.models.unstack_layers(params)."
                )
            (x, routed), new_cache = self._scan(x, context, lead.prefix, per_layer), None
        else:
            layers = Layers(config, self.remat, self.attention, name=LAYERS)
            x, new_cache, routed = layers(x, context, lead.prefix, per_layer)
        x = x[:, lead.prompt_length :]
        norm = config.norm, config.norm_eps, config.norm_offset, config.output_scale
        hidden = Norm(*norm, name="final_norm")(x)
        routed = jax.tree.map(lambda leaf: leaf[:, :, lead.prompt_length :], routed)
        return Output(hidden, self._logits(hidden), new_cache, routed)

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
        branches: Branches | None = None,
    ) -> Prediction:
        """The `jaxft.models.Forward` of decoders: reads `tokens`, `positions` and `segment_ids` of a batch.

        Models that read images or audio also read their columns. `key` is not used: decoders have no dropout.
        Other columns of the batch are ignored.
        """
        del key
        names = ("positions", "segment_ids")
        inputs = {name: batch.get(name) for name in names}
        inputs |= dict(cache=cache, noise=noise, branches=branches)
        if self.config.towers:
            columns = (
                name
                for tower in self.config.towers
                for name in (*tower.columns, embeddings_column(tower))
            )
            inputs["media"] = {name: batch[name] for name in columns if name in batch}
        if self.config.prefix_attention and cache is None:
            inputs["prefix"] = prefix_of(batch)
        output = self.apply({"params": params}, jnp.asarray(batch["tokens"]), **inputs)
        softcap = self.config.final_softcap
        return Prediction(output.hidden, self.head(params), softcap, output.cache, output.routing)

    def branch_obstacle(self, params: Any = None, *, held: Any = None) -> str | None:
        """The reason why completions cannot share their prompt in a row (`branches`), if there is one."""
        if self.config.delta is not None:
            return "layers of Gated DeltaNet have one state for a row"
        ropes = (self.config.rope, self.config.local_rope)
        if any(rope is not None and rope.by_length for rope in ropes):
            return "rotary frequencies depend on a text's length (dynamic or longrope scaling)"
        if self.config.towers:
            return "images and audio are read row by row"
        if params is not None and virtual_tokens(params):
            return "params have a soft prompt or prefix"
        return None if held is None else "a cache is given"

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache of `length` slots for `batch` rows; dtype None: the activations' type."""
        dtype = self.dtype if dtype is None else dtype
        config = self.config
        states = sum(config.has_state(i) for i in range(config.num_layers))
        memories = empty_memories(config.delta, states, batch, dtype)
        return empty_cache(config.cache_shapes, batch, length, dtype, memories)

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

    def _with_media(self, x, tokens, media):
        """The embedded tokens, with those of images and audio in their places."""
        for tower in self.config.towers:
            columns = tower.example(x.shape[0]) if self.is_initializing() else media
            if embeddings_column(tower) in columns:
                embeddings = jnp.asarray(columns[embeddings_column(tower)])
            elif all(name in columns for name in tower.columns):
                module = tower.module(self.dtype, self.remat)
                embeddings = module(*(columns[name] for name in tower.columns))
            else:
                continue
            x = put_embeddings(x, tokens, tower.token, embeddings)
        return x

    def _grid(self, lead, tokens, segment_ids, media, cache):
        """[3, B, T]: the positions of rotary sections; None if the given positions count."""
        if self.config.rope is None or not self.config.rope.sections:
            return None
        if cache is not None and not cache.empty:
            new = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
            following = next_positions(cache.positions, cache.valid, new)
            return jnp.broadcast_to(following, (3, *following.shape))
        tower = next((t for t in self.config.towers if "places" in t.columns), None)
        if tower is None or "places" not in media:
            return None
        if lead.length:
            raise ValueError(
                f"{self.config.family}: soft prompts and prefixes are not supported beside images; use LoRA."
            )
        return grid_positions(tokens, segment_ids, tower.token, media["places"], tower.merge)

    def _stacked(self) -> bool:
        params = self.variables.get("params", {})
        return self.scan_layers if LAYERS not in params else is_stacked(params)

    def _context(self, lead, positions, segment_ids, cache, grid):
        config, start, mask = self.config, None, None
        by_length = any(
            rope is not None and rope.by_length for rope in (config.rope, config.local_rope)
        )
        # In a cache, keys of tokens to come must have the frequencies of those before.
        lengths = 0 if cache is None else cache.length
        if by_length and cache is None:
            ids, front = segment_ids, ((0, 0), (lead.prompt_length, 0))
            lengths = text_lengths(positions, None if ids is None else jnp.pad(ids, front, "edge"))
        turns = positions if grid is None else grid
        table = functools.partial(_table, positions=turns, lengths=lengths)
        key_positions = before(jnp.arange(lead.prefix_length), positions)
        if cache is not None:
            valid = jnp.ones(key_positions.shape, bool)
            if segment_ids is not None:
                valid = valid.at[:, -segment_ids.shape[1] :].set(segment_ids > 0)
            segment_ids = None if segment_ids is None else valid.astype(jnp.int32)
            # With virtual tokens in front, distances differ from those between slots.
            start = None if cache.empty and not lead.length else cache.index
            cache = reserve(cache, key_positions, valid, lead.length)
        elif lead.length:
            mask = lead_mask(lead, segment_ids, positions.shape[1] - lead.prompt_length)
        wide = config.head_dim if config.full_heads is None else config.full_heads.size
        local = config.local_rope or config.rope
        tables = table(config.rope, head_dim=wide), table(local, head_dim=config.head_dim)
        return Context(segment_ids, positions, *tables, cache, start, mask, key_positions)

    def _scan(self, x, context, prefix, per_layer):
        config = self.config
        if config.experts is not None and config.experts.dense_layers:
            raise ValueError(
                f"Decoder: layers {config.experts.dense_layers} have an MLP and the others experts, and "
                "layers of two kinds cannot be scanned; use scan_layers=False."
            )
        if config.delta is not None:
            raise ValueError(
                f"Decoder: layers {config.delta.layers} are Gated DeltaNets and the others attend, and "
                "layers of two kinds cannot be scanned; use scan_layers=False."
            )
        if not config.stackable:
            raise ValueError(
                f"Decoder: layers of {config.family} differ in their heads or MLPs, or read the keys and "
                "values of others, and such layers cannot be scanned; use scan_layers=False."
            )
        local = jnp.array([config.window(i) is not None for i in range(config.num_layers)])
        windows = None
        if config.shared_window is None and any(config.windows):
            # A window longer than any input masks nothing, so one program serves all layers.
            windows = jnp.array([config.window(i) or 2**30 for i in range(config.num_layers)])
        scanned = nn.scan(
            remat_block(Block, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )
        turns = jnp.array([i not in config.unrotated for i in range(config.num_layers)])
        own = LayerInputs(prefix, None if per_layer is None else jnp.moveaxis(per_layer, 2, 0))
        body = scanned(config, self.remat, self.attention, config.layer(0), name=LAYERS)
        x, (_, _, routed) = body(x, LayerKind(local, windows, turns), own, None, context)
        return x, routed


class OutputKernel(nn.Module):
    """Holds the output projection of models whose embeddings are not tied."""

    config: DecoderConfig

    @nn.compact
    def __call__(self):
        shape = (self.config.hidden_size, self.config.vocab_size)
        return read(self, "kernel", KERNEL_INIT, shape)


def _table(rope: Rope | None, *, positions, head_dim, lengths):
    if rope is None:
        return None
    if rope.sections and positions.ndim == 2:  # texts without images
        positions = jnp.broadcast_to(positions, (3, *positions.shape))
    return rope_table(rope, head_dim, positions, lengths)
