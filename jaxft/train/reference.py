"""Log-probs of a reference model: once, as a column of the data, or inside each step where it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.adapters import combine, partition
from jaxft.data import TokenisedGroup, finite_group_batches
from jaxft.models import Forward
from jaxft.objectives import sequence_log_probs
from jaxft.optim.perturbations import wide
from jaxft.parallel import in_turn, mesh_context, to_host
from jaxft.train.batches import place_batch
from jaxft.train.books import Book


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


def moving_reference(forward: Forward, alpha: float, every: int, *, ld_alpha: float = 1.0) -> Book:
    """A reference that follows the params: π_ref <- α π + (1 - α) π_ref after every τ-th step.

    TR-DPO: Gorbatovski et al., 2024, arxiv.org/abs/2404.09656: its soft update for α below 1, its hard one
    for α = 1. The reference is of what trains: of an adapter's factors rather than of the kernels that they
    make, which is the same for α = 1 alone.

    The batch gets `ref_log_probs` [B, G] under it: log π_ref(completion | prompt), summed over tokens, which
    costs a forward pass a step. The entry of the carry is (steps done, reference).

    Args:
        forward: such as `model.forward` of a Decoder.
        alpha: α in (0, 1], what the reference takes of the params; the paper's is 0.6.
        every: τ, steps between two moves; the paper's is 512.
        ld_alpha: see `sequence_log_probs`.

    Raises:
        ValueError: for alpha or every outside these.
    """
    if not 0 < alpha <= 1 or every < 1:
        raise ValueError(
            f"moving_reference: alpha must lie in (0, 1] and every be at least 1, got {alpha} and {every}."
        )

    def give(entry, params, batch):
        whole = combine(entry[1], partition(params)[1])
        found = sequence_log_probs(forward, whole, batch, ld_alpha=ld_alpha).sums
        return {"ref_log_probs": jax.lax.stop_gradient(found)}

    def update(entry, trainable, metrics):
        del metrics
        steps, reference = entry[0] + 1, entry[1]
        mix = lambda ref, new: (alpha * wide(new) + (1 - alpha) * wide(ref)).astype(ref.dtype)
        follow = lambda ref, new: jnp.where(steps % every == 0, mix(ref, new), ref)
        return steps, jax.tree.map(follow, reference, trainable)

    start = lambda params: (jnp.zeros((), jnp.int32), partition(params)[0])
    return Book(start, give, update)
