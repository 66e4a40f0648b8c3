"""Log-probs of a reference model: a column of the data, or computed in each step if it moves."""

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
    """Adds the column `ref_log_probs` [G], log π_ref(completion | prompt) summed over tokens, to groups.

    If `params` are those from which training starts, adapters included, the reference is the start.

    Args:
        forward: such as `model.forward` of a Decoder.
        params: params of the reference.
        groups: in any order; groups of similar length are batched together.
        batch_size: groups per batch, over all processes.
        max_length: maximum length of a sequence in tokens.
        mesh: as for `fit`. With several processes all pass the same groups, and each computes a share.
        ld_alpha: see `sequence_log_probs`.
    """
    sums_of = lambda params, batch: (
        sequence_log_probs(forward, params, batch, ld_alpha=ld_alpha).sums
    )
    run = jax.jit(sums_of)
    longest = lambda i: max(len(part.tokens) for part in groups[i].parts)
    order = sorted(range(len(groups)), key=longest)
    # Other columns would only cause more compilations.
    bare = [dataclasses.replace(groups[i], columns={}) for i in order]
    sums = []
    for batch in finite_group_batches(bare, batch_size=batch_size, max_length=max_length):
        with mesh_context(mesh):
            sums.append(in_turn(run(params, place_batch(batch, mesh))))
    flat = np.concatenate(to_host(sums)).astype(np.float32)
    found = dict(zip(order, flat, strict=False))  # the last batch may be filled up
    return [group.with_column("ref_log_probs", found[i]) for i, group in enumerate(groups)]


def moving_reference(forward: Forward, alpha: float, every: int, *, ld_alpha: float = 1.0) -> Book:
    """Returns a book whose reference follows the params: π_ref <- α π + (1 - α) π_ref every τ steps.

    TR-DPO: Gorbatovski et al., 2024, arxiv.org/abs/2404.09656: the soft update for α < 1, the hard update
    for α = 1. The average is over trainable leaves: over an adapter's factors rather than the kernels that
    they produce, which is equivalent only for α = 1.

    The batch gets `ref_log_probs` [B, G], log π_ref(completion | prompt) summed over tokens, at the cost of
    one forward pass per step. The entry of the carry is (steps done, reference).

    Args:
        forward: such as `model.forward` of a Decoder.
        alpha: α in (0, 1], the weight of the params; the paper's is 0.6.
        every: τ, steps between two updates; the paper's is 512.
        ld_alpha: see `sequence_log_probs`.

    Raises:
        ValueError: if alpha or every is out of range.
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
