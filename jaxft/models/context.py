"""The inputs that the layers of a decoder share, and attention among the tokens of one call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attend, attention
from jaxft.kernels.branches import Branches, branch_attention
from jaxft.models.cache import Cache, cache_mask, window_mask
from jaxft.models.config import DecoderConfig


class LayerKind(NamedTuple):
    """The differences between layers: Python values, or traced ones under a scan."""

    local: bool | jax.Array  # whether it has a window, and so the local rotary table
    window: int | jax.Array | None
    turns: bool | jax.Array = True  # whether it has rotary positions


class LayerInputs(NamedTuple):
    """The inputs of one layer beside the residual stream; None: it has no such input."""

    prefix: Any = None  # [2, l, G, K]: keys and values in front
    per_layer: jax.Array | None = None  # [B, T, P]: see jaxft.models.per_layer
    # Keys and values [B, S, G, K] of this call's tokens, from the layer that it reads.
    shared: tuple[jax.Array, jax.Array] | None = None


class Context(NamedTuple):
    """The inputs that all layers share: see `Decoder.__call__` for shapes."""

    segment_ids: jax.Array | None
    positions: jax.Array  # [B, N]: of a prompt, if there is one, and the tokens
    table: Any  # (cos, sin) of the rotary positions, None without
    local_table: Any  # the same for layers with a window
    cache: Cache | None
    start: jax.Array | None  # the slot of the first key; None: the cache was empty
    mask: (
        jax.Array | None
    )  # [B, 1, N, S], without windows, for virtual tokens or a prefix, without a cache
    key_positions: jax.Array  # [B, S]
    branches: Branches | None = None  # the layout of rows whose prompt several completions share
    opened: jax.Array | None = None  # [B, 1, N, S], visible beside `mask`, also outside of windows

    def attend(
        self, *heads: jax.Array, window: Any, implementation: str | None, **options: Any
    ) -> jax.Array:
        """Attention of queries, keys and values of this call's tokens, and of a prefix in front.

        Args:
            heads: queries [B, T, H, K], keys and values [B, S, G, K].
            window: of the layer.
            implementation: of jaxft.kernels.attention.
            options: of the scores: `scale`, `softcap`, `sinks`.
        """
        if self.mask is not None:
            mask = self.mask
            if window is not None:
                mask = mask & window_mask(self.positions, self.key_positions, window)
            mask = mask if self.opened is None else mask | self.opened
            return attend(*heads, mask, **options)
        if self.branches is not None:
            attention_of = functools.partial(branch_attention, branches=self.branches)
        else:
            attention_of = attention
        return attention_of(
            *heads,
            segment_ids=self.segment_ids,
            window=window,
            gradient=self.cache is None,
            implementation=implementation,
            **options,
        )

    def visible(self, window: Any, before: int = 0) -> Callable[..., jax.Array]:
        """The masks of `attend_cache`: the queries' slots come after `before` new ones of a prefix."""
        start = self.start + before

        def visible(i, rows):
            positions = jax.lax.dynamic_slice_in_dim(self.positions, i, rows, axis=1)
            return cache_mask(self.cache, start + i, positions, window)

        return visible


def layer_table(config: DecoderConfig, layer: LayerKind, context: Context) -> Any:
    """The (cos, sin) of a layer; None: it has no rotary positions."""
    if config.rope is None:
        return None
    table = context.table
    if config.local_rope is not None or config.full_heads is not None:
        local = context.local_table
        if isinstance(layer.local, bool):
            table = local if layer.local else table
        else:
            table = jax.tree.map(functools.partial(jnp.where, layer.local), local, table)
    if not config.unrotated:
        return table
    if isinstance(layer.turns, bool):
        return table if layer.turns else None
    cos, sin = table
    return jnp.where(layer.turns, cos, 1.0), jnp.where(layer.turns, sin, 0.0)
