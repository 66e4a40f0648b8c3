"""Virtual tokens in front of each row: a prompt before the embeddings, a prefix of keys and values."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attention_mask
from jaxft.weights import to_dense


class Lead(NamedTuple):
    """The virtual tokens of a call: params["prefix"], then params["prompt"], then the tokens.

    Virtual tokens have the first positions, so that token 0 has position `length`, in each
    segment of a packed row. A prefix has no queries, and its keys are not rotated. Windows hide virtual
    tokens like any others, as in PEFT.
    """

    prompt: jax.Array | None  # [l, D], on the scale of the embedding table
    prefix: jax.Array | None  # [L, 2, l, G, K]: keys and values of each layer
    length: int  # of both, added here or already in the cache

    @property
    def prompt_length(self) -> int:
        """Rows to put before the tokens."""
        return 0 if self.prompt is None else self.prompt.shape[0]

    @property
    def prefix_length(self) -> int:
        """Keys to put before each layer's."""
        return 0 if self.prefix is None else self.prefix.shape[2]


def virtual_tokens(params: Mapping[str, Any]) -> int:
    """The number of virtual tokens that params put before each row, which is their number of cache slots."""
    return sum(params[name].shape[0] for name in ("prompt", "prefix") if name in params)


def check_virtual(config: Any, params: Container[str]) -> None:
    """Raises ValueError for a prompt or prefix that the layers of a DecoderConfig cannot take."""
    if "prompt" in params and config.per_layer is not None:
        raise ValueError(
            f"{config.family}: a prompt has no per-layer embeddings, which this model has for its tokens; "
            "use another adapter, such as lora or bottleneck."
        )
    if "prefix" in params and (config.full_heads is not None or config.shared_layers):
        raise ValueError(
            f"{config.family}: a prefix holds keys and values of one size for each layer, and this model's "
            "layers differ in their heads or share them; use another adapter, such as lora or bottleneck."
        )


def read_lead(
    params: Mapping[str, Any], layers: int, groups: int, size: int, held: int = 0
) -> Lead:
    """The prompt and prefix in a model's params, unless a cache already holds them (`held` > 0).

    Raises:
        ValueError: if the cache holds another number of virtual tokens, or the prefix belongs to
            another model.
    """
    length = virtual_tokens(params)
    if held not in (0, length):
        raise ValueError(
            f"the cache begins with {held} virtual tokens but the params have {length}; start from "
            "an empty cache when they change."
        )
    if held == length:
        return Lead(None, None, length)
    prompt, prefix = (
        to_dense(params[name]) if name in params else None for name in ("prompt", "prefix")
    )
    if prefix is not None:
        width = layers * 2 * groups * size
        if prefix.shape[1] != width:
            raise ValueError(
                f"the prefix has rows of {prefix.shape[1]} numbers; {layers} layers of {groups} KV "
                f"heads of size {size} need {width}: it is another model's."
            )
        prefix = prefix.reshape(prefix.shape[0], layers, 2, groups, size)
        prefix = jnp.moveaxis(prefix, 0, 2)
    return Lead(prompt, prefix, length)


def before(rows: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, T, ...] with rows [l, ...] in front of each of its B sequences: [B, l + T, ...]."""
    x = jnp.asarray(x)
    rows = jnp.broadcast_to(rows.astype(x.dtype)[None], (x.shape[0], *rows.shape))
    return jnp.concatenate([rows, x], axis=1)


def put_prompt(
    lead: Lead, x: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(x, positions) of the prompt and the embedded tokens, x [B, T, D]; positions None: from 0.

    If positions is None, they restart in each segment of a packed row: all segments share one prompt, and
    must have the same distance to it.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        if lead.length and segment_ids is not None:
            positions = positions - _segment_starts(segment_ids)
    positions = positions + lead.length
    if lead.prompt is None:
        return x, positions
    return before(lead.prompt, x), before(jnp.arange(lead.prefix_length, lead.length), positions)


def lead_mask(lead: Lead, segment_ids: jax.Array | None, length: int) -> jax.Array:
    """[1 or B, 1, N, P + N]: the keys that the N = l + T queries of prompt and tokens see, without windows.

    Each query sees the whole prefix, the prompt up to itself, and earlier tokens of its own segment.
    A prompt sees no tokens, so all segments can share it.
    """
    size = lead.prompt_length + length
    mask = attention_mask(size, None, None, True)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (lead.prompt_length, 0)))
        shared = (jnp.arange(size) < lead.prompt_length).reshape(1, 1, 1, -1)
        mask = (mask & shared) | attention_mask(size, segment_ids, None, True)
    return open_front(mask, lead.prefix_length)


def open_front(mask: jax.Array, count: int) -> jax.Array:
    """The mask [..., S] of attention with `count` keys in front that every query sees."""
    return jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(count, 0)], constant_values=True)


def check_room(lead: Lead, length: int, positions: int) -> None:
    """Raises ValueError if `length` tokens after the virtual ones exceed a table of positions."""
    if lead.length and lead.length + length > positions:
        raise ValueError(
            f"{lead.length} virtual tokens and rows of {length} exceed the model's {positions} "
            f"positions; cut rows to {positions - lead.length} tokens."
        )


def _segment_starts(segment_ids):
    """[B, T]: the index at which each token's segment begins."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    same = segment_ids == jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(same, 0, index), axis=1)
