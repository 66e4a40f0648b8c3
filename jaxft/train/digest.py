"""Checksums of arrays that do not depend on the arrays' sharding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.parallel import in_turn, path_name, to_host
from jaxft.train.packing import groups, packed


def digests(tree: Any, parts: dict[str, jax.Array] | None = None) -> dict[str, list]:
    """{path: [shape, data type, checksum]} for each leaf, as JSON.

    Args:
        parts: the values, as `packed` returns them; only shapes are then read from `tree`. None: the
            values of `tree`.
    """
    leaves, found = jax.tree_util.tree_leaves_with_path(tree), groups(tree)
    parts = packed(tree) if parts is None else parts
    # If that is safe, all are started before the first is awaited.
    several = lambda name: len(found[name]) > 1
    sums = {n: in_turn((_checksums if several(n) else checksum)(x)) for n, x in parts.items()}
    each = {}
    for name, values in to_host(sums).items():
        each |= dict(zip(found[name], values.reshape(-1).tolist(), strict=True))
    described = enumerate(leaves)
    return {path_name(p): [list(x.shape), str(x.dtype), each[i]] for i, (p, x) in described}


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Sum over elements of a 32-bit hash of (bits, position): a uint32 that any changed bit changes.

    The hash is MurmurHash3's finalizer (Appleby, public domain). Integer sums wrap and do not
    depend on the order of their terms, so every sharding gives the same checksum.
    """
    words = _words(x)
    place = jnp.zeros((), jnp.uint32)
    for axis, stride in enumerate(_strides(words.shape)):
        axis_index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + axis_index * np.uint32(stride)
    h = words ^ (place * np.uint32(0x9E3779B9) + np.uint32(1))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


_checksums = jax.jit(jax.vmap(checksum))


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns whether no leaf has a NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _strides(shape):
    strides = np.cumprod([1, *shape[:0:-1]], dtype=object)[::-1]
    return [int(s) % 2**32 for s in strides][: len(shape)]


def _words(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else None
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
        bits = jnp.finfo(x.dtype).bits
    if bits is None:
        small = x.dtype == jnp.bool_ or jnp.iinfo(x.dtype).bits < 8
        x = x.astype(jnp.int8) if small else x
        bits = jnp.iinfo(x.dtype).bits
    # 64-bit numbers become pairs of words on a new last axis.
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}[bits]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
