"""Attention of rows in which several continuations follow one shared text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.kernels.attention import QUERIES, attention, attention_mask, weigh
from jaxft.kernels.backend import target_platform
from jaxft.kernels.splash import TILE, splash_attention
from jaxft.parallel.attention import attention_layout
from jaxft.parallel.axes import length_axes


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Branches:
    """The layout of a row of T tokens: `trunk` shared ones, then `count` branches of equal length N.

    A token of a branch sees the trunk and the earlier tokens of its own branch, so T = trunk + count N.
    """

    trunk: int
    count: int

    def size(self, length: int) -> int:
        """N for rows of `length` tokens.

        Raises:
            ValueError: if the branches do not fill the rows, or there is no trunk or no branch.
        """
        size, rest = divmod(length - self.trunk, max(self.count, 1))
        if min(self.trunk, self.count, size) < 1 or rest:
            raise ValueError(
                f"branches: rows of {length} tokens are not a trunk of {self.trunk} and {self.count} "
                "branches of one length, each with at least one token."
            )
        return size


def branch_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    branches: Branches,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    gradient: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """Causal attention of rows [trunk | branch 1 | branch 2 | ...], whose trunk is computed once.

    Equal to `attention` of the rows [trunk | branch i], also in what a window counts: the distance between
    a branch's token and the trunk's is that of a row with this branch only. It computes the scores of
    trunk x trunk and of each branch x (trunk + branch), as such rows do, but the first only once.

    Args:
        query, key, value, window, scale, softcap, sinks, gradient: as for `attention`.
        branches: the layout.
        segment_ids: 0 is padding, in the trunk or a branch; all other tokens of a row have one id.
        implementation: that of `attention` for the trunk. The branches have "splash", "cudnn" and "xla"
            too; the others are one form in jnp, which never copies the trunk's keys.

    Raises:
        ValueError: for a layout that does not fit the rows, or a mesh that splits tokens over "context".
    """
    branches.size(query.shape[1])
    if implementation == "gathered" or length_axes(query.shape[1]):
        raise ValueError(
            "attention: branches of a shared prompt need all tokens of a row on one device; use a mesh "
            "without 'context', or rows that do not share their prompt."
        )
    masks = dict(segment_ids=segment_ids, window=window)
    scores = dict(softcap=softcap, sinks=sinks)
    scores["scale"] = query.shape[-1] ** -0.5 if scale is None else scale
    own = lambda x: None if x is None else x[:, : branches.trunk]
    trunk = attention(
        *map(own, (query, key, value)),
        **masks | {"segment_ids": own(segment_ids)},
        **scores,
        gradient=gradient,
        implementation=implementation,
    )
    form = _form(query, branches, window, softcap, sinks, implementation)
    return jnp.concatenate([trunk, form(query, key, value, branches, masks, scores)], axis=1)


def _form(query, branches, window, softcap, sinks, implementation):
    """The function that computes the branches."""
    if implementation is None and target_platform() == "tpu":
        known = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
        long = branches.size(query.shape[1]) >= TILE
        return _splash if known and long and not isinstance(window, jax.Array) else _joint
    if implementation == "splash":
        return _splash
    # The trunk's call has refused "cudnn" and "xla" with a soft cap or sinks.
    return _cudnn if implementation == "cudnn" else _joint


def _joint(query, key, value, branches, masks, scores):
    """All branches of a row against its trunk's keys in one product, and each against its own keys."""
    count, size = branches.count, branches.size(query.shape[1])
    batch, _, heads, width = query.shape
    groups = key.shape[2]
    mask = _mask(query, branches, **masks)

    def run(query, key, value, trunk_key, trunk_value, mask):
        """Branches [B, C, N, ...] of C <= `count`; mask [1 or B, C, N, trunk + N]."""
        rows = query.reshape(batch, -1, groups, heads // groups, width)
        shared = jnp.einsum(
            "btghk,bsgk->bghts", rows, trunk_key, preferred_element_type=jnp.float32
        )
        parts = query.reshape(*query.shape[:3], groups, heads // groups, width)
        own = jnp.einsum("bctghk,bcsgk->bghcts", parts, key, preferred_element_type=jnp.float32)
        own = own.reshape(*shared.shape[:4], size)
        mask = mask.reshape(mask.shape[0], 1, -1, mask.shape[-1])
        weights = weigh(jnp.concatenate([shared, own], axis=-1), mask, **scores)
        shared, own = jnp.split(weights.astype(value.dtype), [branches.trunk], axis=-1)
        own = own.reshape(*own.shape[:3], -1, size, size)
        mixed = jnp.einsum("bghts,bsgk->btghk", shared, trunk_value).reshape(parts.shape)
        mixed += jnp.einsum("bghcts,bcsgk->bctghk", own, value)
        return mixed.reshape(query.shape)

    split = lambda x: x[:, branches.trunk :].reshape(batch, count, size, *x.shape[2:])
    parts = *map(split, (query, key, value)), mask
    trunk = key[:, : branches.trunk], value[:, : branches.trunk]
    if count * size <= QUERIES or target_platform() == "cpu":
        out = run(*parts[:3], *trunk, mask)
        return out.reshape(batch, -1, heads, width)

    # One branch at a time, whose scores the backward pass computes again.
    @jax.checkpoint
    def one(_, parts):
        *states, mask = (x[:, None] for x in parts)
        return None, run(*states, *trunk, mask)[:, 0]

    _, out = jax.lax.scan(one, None, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, width)


def _splash(query, key, value, branches, masks, scores):
    rows = _apart(branches, query, key, value, masks["segment_ids"])
    out = splash_attention(*rows[:3], **masks | {"segment_ids": rows[3]}, **scores)
    return out.reshape(query.shape[0], -1, *query.shape[2:])


def _cudnn(query, key, value, branches, masks, scores):
    *rows, segment_ids = _apart(branches, query, key, value, masks["segment_ids"])
    mask = _mask(query, branches, **masks)
    mask = jnp.broadcast_to(mask, (query.shape[0], *mask.shape[1:]))
    mask = mask.reshape(-1, 1, *mask.shape[2:])
    run = lambda query, key, value, mask: jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scores["scale"], implementation="cudnn"
    )
    place = attention_layout(*rows[:2])
    specs = (*[place.states] * 3, PartitionSpec(place.rows))
    return place.mapped(run, specs)(*rows, mask).reshape(query.shape[0], -1, *query.shape[2:])


def _apart(branches, query, key, value, segment_ids):
    """(queries [B C, N, H, K], keys, values and ids [B C, trunk + N, ...]): each branch as a row."""
    split = lambda x: x[:, branches.trunk :].reshape(x.shape[0] * branches.count, -1, *x.shape[2:])

    def whole(x: Any):
        if x is None:
            return None
        trunk = jnp.repeat(x[:, : branches.trunk], branches.count, axis=0)
        return jnp.concatenate([trunk, split(x)], axis=1)

    return split(query), whole(key), whole(value), whole(segment_ids)


def _mask(query, branches, segment_ids, window):
    """[1 or B, C, N, trunk + N]: True where a branch's query sees a key of the trunk or its own."""
    size = branches.size(query.shape[1])
    length, start = branches.trunk + size, branches.trunk
    ids = _apart(branches, query, query, query, segment_ids)[3]
    mask = attention_mask(length, ids, window, True, start, size)
    if segment_ids is None:
        return jnp.broadcast_to(mask, (1, branches.count, size, length))
    return mask.reshape(-1, branches.count, size, length)
