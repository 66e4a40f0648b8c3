"""Batches of groups [B, G, T] as the rows [N, T] that a forward reads, with the columns of their records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxft.models.checks import check_tokens

# The columns with a value for each sequence of a group; any other column has one value for the group.
OF_SEQUENCES = ("tokens", "loss_mask", "segment_ids", "positions")

Batch = Mapping[str, Any]


def as_rows(batch: Batch) -> dict[str, Any]:
    """The batch [B, ...] with one row [B·G, T] for each sequence; a batch of rows [N, T] is unchanged.

    A column of records (images, a source sentence) is repeated for the sequences of its group. Entries that
    are not arrays of B rows (nested batches, running means) are left out: no forward reads them.
    """
    tokens = jnp.asarray(batch["tokens"])
    if tokens.ndim == 2:
        return dict(batch)
    count, size, length = check_tokens(batch, "B G T")
    rows = {}
    for name, column in batch.items():
        if name in OF_SEQUENCES:
            rows[name] = jnp.reshape(column, (-1, length))
        elif hasattr(column, "shape") and column.shape[:1] == (count,):
            rows[name] = jnp.repeat(column, size, axis=0)
    return rows


def of_group(batch: Batch, i: int) -> dict[str, Any]:
    """Sequence `i` of each group, as groups of one, with the columns of their records.

    Raises:
        ValueError: if groups are smaller.
    """
    size = check_tokens(batch, "B G T")[1]
    if i >= size:
        raise ValueError(
            f"of_group: no sequence {i} in groups of {size}; tokens must be [B, {i + 1}, T]."
        )
    pick = lambda name, x: x[:, i : i + 1] if name in OF_SEQUENCES else x
    return {name: pick(name, column) for name, column in batch.items()}
