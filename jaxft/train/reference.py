"""Log-probs of a reference model: once, as a column of the data, or at each step where it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from optax import tree_utils

from jaxft.adapters import combine, partition
from jaxft.data import TokenisedGroup, finite_group_batches
from jaxft.models import Forward
from jaxft.objectives import sequence_log_probs
from jaxft.parallel import in_turn, mesh_context, to_host
from jaxft.train.batches import place_batch
from jaxft.train.state import TrainState


def reference_log_probs(
    forward: Forward,
    params: Any,
    groups: Sequence[TokenisedGroup],
    *,
    batch_size: int,
    max_length: int,
    mesh: Mesh | None = None,
    ld_alpha: float = 1.0,
) -> list[TokenisedGroup]:
    """The groups with a column `ref_log_probs` [G]: log π_ref(completion | prompt), summed over tokens.

    With the params from which training starts, adapters included, the reference is that start.

    Args:
        forward: such as `model.forward` of a Decoder.
        params: of the reference.
        groups: in any order; batches are made of those of like length.
        batch_size: groups of a batch, over all processes.
        max_length: of a sequence.
        mesh: as for `fit`. On several processes all pass the same groups, and each computes its share.
        ld_alpha: see `sequence_log_probs`.
    """
    sums_of = lambda params, batch: (
        sequence_log_probs(forward, params, batch, ld_alpha=ld_alpha).sums
    )
    run = jax.jit(sums_of)
    longest = lambda i: max(len(part.tokens) for part in groups[i].parts)
    order = sorted(range(len(groups)), key=longest)
    # Other columns would only make more programs.
    bare = [dataclasses.replace(groups[i], columns={}) for i in order]
    sums = []
    for batch in finite_group_batches(bare, batch_size=batch_size, max_length=max_length):
        with mesh_context(mesh):
            sums.append(in_turn(run(params, place_batch(batch, mesh))))
    flat = np.concatenate(to_host(sums)).astype(np.float32)
    found = dict(zip(order, flat, strict=False))  # the last batch may be filled up
    return [group.with_column("ref_log_probs", found[i]) for i, group in enumerate(groups)]


def moving_reference_log_probs(
    forward: Forward, *, mesh: Mesh | None = None, ld_alpha: float = 1.0
) -> Callable[[TrainState, Any], Any]:
    """add(state, batch) -> the batch with `ref_log_probs` [B, G] under the reference of `moving_reference`.

    For `StateBatches`; the optimizer must have that transform. It costs a forward pass a step.

    Args:
        forward: such as `model.forward` of a Decoder.
        mesh: as for `fit`.
        ld_alpha: see `sequence_log_probs`.
    """

    @jax.jit
    def run(params, reference, batch):
        whole = combine(reference, partition(params)[1])
        return sequence_log_probs(forward, whole, batch, ld_alpha=ld_alpha).sums

    def add(state, batch):
        reference = tree_utils.tree_get(state.opt_state, "reference")
        names = ("tokens", "loss_mask", "segment_ids", "positions")
        given = place_batch({name: batch[name] for name in names}, mesh)
        with mesh_context(mesh):
            found = in_turn(run(state.params, reference, given))
        return {**batch, "ref_log_probs": found}

    return add


def with_running_mean(state: TrainState, batch: Any) -> Any:
    """The batch with `running`, (mean, weight) of the optimizer's `running_mean`: for `StateBatches`."""
    names = ("running_mean", "running_weight")
    # Copies: the step that gets them overwrites the state.
    running = tuple(jnp.copy(tree_utils.tree_get(state.opt_state, name)) for name in names)
    return {**batch, "running": running}
