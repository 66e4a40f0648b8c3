"""Packs many small leaves of a tree into few larger arrays, and back: writing costs time per array."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.parallel import path_name

SMALL = 1 << 20  # bytes of a leaf; larger ones stay alone, so that little is copied


def groups(tree: Any) -> dict[str, list[int]]:
    """{name: indices of leaves}: small leaves with equal name (ignoring digits), shape and dtype.

    Groups are the same on every mesh. All leaves of a group have the same sharding.
    """
    found: dict[str, list[int]] = {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = path_name(path).replace("/", "-") or "value"
        if jnp.issubdtype(leaf.dtype, jnp.number) and leaf.size * leaf.dtype.itemsize <= SMALL:
            shape = "x".join(map(str, leaf.shape))
            name = f"{re.sub(r'[0-9]+', 'N', name)}-{leaf.dtype}-{shape}"
        found.setdefault(name, []).append(i)
    return found


def packed(tree: Any) -> dict[str, jax.Array]:
    """Stacks the leaves of each group on a new first axis; a single leaf is unchanged."""
    leaves = jax.tree.leaves(tree)
    parts = {name: [leaves[i] for i in places] for name, places in groups(tree).items()}
    stack = lambda part: part[0] if len(part) == 1 else _stack(_of(part[0]))(part)
    return {name: stack(part) for name, part in parts.items()}


def packed_shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the result of `packed` as shapes with shardings."""
    leaves = jax.tree.leaves(tree)

    def of(places):
        leaf, sharding = leaves[places[0]], _of(leaves[places[0]])
        if len(places) == 1:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        shape = (len(places), *leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_stacked(sharding) or sharding)

    return {name: of(places) for name, places in groups(tree).items()}


def unpacked(parts: dict[str, jax.Array], tree: Any) -> Any:
    """Inverts `packed`: a tree with the structure and shardings of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    for name, places in groups(tree).items():
        whole = parts[name]
        if len(places) > 1:
            whole = _split(len(places), _of(leaves[places[0]]))(whole)
        for i, leaf in zip(places, whole if len(places) > 1 else [whole], strict=True):
            leaves[i] = leaf
    return treedef.unflatten(leaves)


def _of(leaf):
    return getattr(leaf, "sharding", None)


@functools.cache
def _stack(sharding):
    return jax.jit(jnp.stack, out_shardings=_stacked(sharding))


@functools.cache
def _split(count, sharding):
    own = sharding if isinstance(sharding, NamedSharding) else None
    return jax.jit(lambda x: [x[i] for i in range(count)], out_shardings=own)


def _stacked(sharding):
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
