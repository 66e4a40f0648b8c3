"""Rows to the devices of their experts and back by two all-to-alls along `expert`; no row is dropped.

By `jax.lax.ragged_all_to_all`, which sends the rows and nothing else; XLA:CPU does not have it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.kernels.pullback import linear_map
from jaxft.parallel.axes import EXPERT_AXIS


class Routes(NamedTuple):
    """The ways of this device's rows, sorted by expert, to P devices with C experts each.

    A device has room for R = P x most rows, because all devices may send it their tokens.
    """

    counts: jax.Array  # [P, P, C] int32, rows from device s to expert c of device p
    me: jax.Array  # [] int32, this device
    sent: int  # rows that a device sends
    most: int  # rows that a device can send to one other

    @property
    def sizes(self) -> jax.Array:
        """[C] int32: rows of each expert of this device, from all devices."""
        return jnp.sum(self.counts[:, self.me], axis=0)

    def dispatched(self, rows: jax.Array) -> jax.Array:
        """rows [N, D], sorted by expert -> [R, D] on the experts' devices, sorted by expert, then zeros."""
        return self._linear(_ragged_to, _ragged_back, rows)

    def collected(self, rows: jax.Array) -> jax.Array:
        """The transposed map: [R, D] on the experts' devices -> [N, D], each row where it came from."""
        return self._linear(_ragged_back, _ragged_to, rows)

    def _linear(self, apply, transpose, rows):
        """A map whose gradient is the exchange in the other direction: nothing is scattered."""
        to = lambda fixed: self._replace(counts=fixed[0], me=fixed[1])
        return linear_map(
            lambda fixed, moving: apply(to(fixed), moving[0]),
            lambda fixed, ct: [transpose(to(fixed), ct)],
            [self.counts, self.me],
            [rows],
        )


def routes(sizes: jax.Array, parts: int, sent: int, most: int) -> Routes:
    """Exchanges the numbers of rows; inside a shard_map over `expert`.

    Args:
        sizes: [E] int32, this device's rows of each expert; their sum is `sent`.
        parts: P, which divides E.
        sent: N.
        most: the largest number of rows that one device can get from another.
    """
    counts = jax.lax.all_gather(sizes, EXPERT_AXIS).reshape(parts, parts, -1)
    me = jax.lax.axis_index(EXPERT_AXIS).astype(jnp.int32)
    return Routes(counts, me, sent, most)


def _ragged_to(to, rows):
    mine = to.counts[:, to.me]  # [P, C]
    # On device p the rows of expert c begin after those of smaller experts, and these by source.
    total = jnp.sum(to.counts, axis=0)
    onto = _before(total, axis=1) + _before(to.counts, axis=0)[to.me]
    own = to.counts[to.me].reshape(-1)
    room = jnp.zeros((len(mine) * to.most, rows.shape[1]), rows.dtype)
    return _ragged(rows, room, _before(own), own, onto.reshape(-1), mine.reshape(-1))


def _ragged_back(to, rows):
    mine = to.counts[:, to.me]
    held = _before(jnp.sum(mine, axis=0))[None] + _before(mine, axis=0)
    parts, own = len(mine), to.counts[to.me].reshape(-1)
    onto = _before(to.counts.reshape(parts, -1), axis=1).reshape(to.counts.shape)[:, to.me]
    room = jnp.zeros((to.sent, rows.shape[1]), rows.dtype)
    return _ragged(rows, room, held.reshape(-1), mine.reshape(-1), onto.reshape(-1), own)


def _ragged(*arguments):
    return jax.lax.ragged_all_to_all(*arguments, axis_name=EXPERT_AXIS)


def _before(x, axis=0):
    """Sums of the entries before each."""
    return jnp.cumsum(x, axis=axis) - x
