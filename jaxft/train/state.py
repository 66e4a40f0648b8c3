"""The state of a run: everything that a checkpoint needs besides the data position."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.adapters import combine, overwritten, partition
from jaxft.parallel import path_name
from jaxft.train.books import Books, start_books


class TrainState(NamedTuple):
    """The value that one optimizer step turns into the next."""

    step: jax.Array  # [] int32, optimizer steps done
    params: Any  # the whole tree: what trains and what is frozen
    opt_state: optax.OptState  # for the trainable part only
    carry: Any  # further state of the run: replay buffer, environments, books; None: nothing
    key: jax.Array  # typed key, the same for the whole run: draws use its streams


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    carry: Any = None,
    *,
    books: Books | None = None,
    donate: bool = False,
) -> TrainState:
    """Returns the state before the first step.

    Arrays that a compiled step overwrites (donates) are copied: trainable leaves, and weights that
    have `committed`. Other frozen leaves are shared with `params`, so one base model serves many runs.

    Args:
        params: a params tree.
        optimizer: any optax transform; it sees the trainable part only.
        key: a typed key.
        carry: any further pytree of arrays that the steps of the run change; copied.
        books: the books of `make_step`: each adds an entry with its name to the carry.
        donate: the params are not copied, so that full fine-tuning holds one model: the first compiled
            step deletes the arrays of `params` that it overwrites. An array that `params` also holds
            elsewhere is copied.

    Raises:
        ValueError: if nothing trains, a trainable leaf is not a float, `key` is not a typed key, or
            `carry` has a typed key, which cannot be saved (derive keys from the state's by `stream`).
    """
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError("init_state: key must be a typed key; make one with jax.random.key(seed).")
    params = jax.tree.map(jnp.asarray, params)
    _check_trainable(partition(params)[0])
    mask = overwritten(params)
    part = lambda wanted: jax.tree.map(lambda m, leaf: leaf if m == wanted else None, mask, params)
    changed, kept = part(True), part(False)
    changed = own(changed, kept) if donate else jax.tree.map(jnp.copy, changed)
    params = combine(changed, kept)
    trainable, _ = partition(params)
    opt_state = optimizer.init(trainable)
    carry = _checked_carry(start_books(books, params, carry))
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, carry, key)
    return state._replace(opt_state=own(state.opt_state, trainable))


def _check_trainable(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    if not leaves:
        raise ValueError(
            "init_state: nothing trains: every weight is frozen. Name the weights to train in "
            "jaxft.adapters.adapt, for example {ALL_LINEAR: lora()}."
        )
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            name = path_name(path)
            raise ValueError(
                f"init_state: {name} would train but is {leaf.dtype}; freeze it (Frozen, "
                "frozen_field) or convert it to a float."
            )


def _checked_carry(carry):
    def check(path, leaf):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
            name = path_name(path)
            raise ValueError(
                f"init_state: carry has a typed key at {name!r}, which checkpoints cannot hold; derive "
                "keys from the state's by jaxft.keys.stream instead."
            )
        return jnp.array(leaf)  # a copy: steps overwrite it

    return jax.tree_util.tree_map_with_path(check, carry)


def own(tree, other):
    """Copies each array of `tree` whose memory is used twice or in `other`, as donation requires."""
    seen = set().union(*map(_buffers, jax.tree.leaves(other)))

    def own(leaf):
        leaf = jnp.asarray(leaf)
        leaf = leaf if seen.isdisjoint(_buffers(leaf)) else jnp.copy(leaf)
        seen.update(_buffers(leaf))
        return leaf

    return jax.tree.map(own, tree)


def _buffers(leaf):
    """Identifies the memory of an array: on a mesh, two arrays may share one buffer."""
    traced = isinstance(leaf, jax.core.Tracer)
    if traced or not isinstance(leaf, jax.Array) or leaf.size == 0:
        return {("id", id(leaf))}
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    shards = leaf.addressable_shards
    return {(s.device.id, s.data.unsafe_buffer_pointer()) for s in shards}
