"""The state of a run: everything that a checkpoint needs besides the data position."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.adapters import combine, partition
from jaxft.adapters.commit import writes_back
from jaxft.weights import is_weight


class TrainState(NamedTuple):
    """What one optimizer step turns into the next."""

    step: jax.Array  # [] int32, optimizer steps done
    params: Any  # the whole tree: what trains and what is frozen
    opt_state: optax.OptState  # of the trainable part only
    key: jax.Array  # typed key, the same for the whole run: draws are from streams of it


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, donate: bool = False
) -> TrainState:
    """The state before the first step.

    What a compiled step overwrites (donates) is copied: trainable leaves, and weights that have
    `committed`. Other frozen leaves are shared with `params`, so one base model serves many runs.

    Args:
        donate: nothing is copied, so that full fine-tuning holds one model: the first compiled step
            deletes the arrays of `params` that it overwrites. No two of them may share memory, as
            device_put of one array to two places does.

    Raises:
        ValueError: if nothing trains, a trainable leaf is no float, or `key` is no typed key.
    """
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError("init_state: key must be a typed key; make one with jax.random.key(seed).")
    params = jax.tree.map(jnp.asarray, params)
    if not donate:
        copy = lambda node: jax.tree.map(jnp.copy, node) if writes_back(node) else node
        params = jax.tree.map(copy, params, is_leaf=is_weight)
    trainable, frozen = partition(params)
    _check_trainable(trainable)
    trainable = _own(trainable, frozen) if donate else jax.tree.map(jnp.copy, trainable)
    params = combine(trainable, frozen)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable), key)
    return state._replace(opt_state=_own(state.opt_state, trainable))


def _check_trainable(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    if not leaves:
        raise ValueError(
            "init_state: nothing trains: every weight is frozen. Name the weights to train in "
            "jaxft.adapters.adapt, for example {ALL_LINEAR: lora()}."
        )
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"init_state: {name} would train but is {leaf.dtype}; freeze it (Frozen, "
                "frozen_field) or convert it to a float."
            )


def _own(tree, other):
    """`tree` with a copy of each array that occurs twice or is in `other`: donated buffers are single."""
    seen = {id(leaf) for leaf in jax.tree.leaves(other)}

    def own(leaf):
        leaf = jnp.copy(leaf) if id(leaf) in seen else jnp.asarray(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)
