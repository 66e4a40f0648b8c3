"""Experience in groups: rows [Q, G, T] of G completions that share their prompt, computed once a group."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.branches import Branches
from jaxft.models import Forward, Prediction, predict
from jaxft.models.checks import check_column, check_forward, check_tokens

Batch = Mapping[str, Any]


def is_grouped(batch: Batch) -> bool:
    """Returns whether the batch is in groups, tokens [Q, G, T]."""
    return np.ndim(batch["tokens"]) == 3


def of_rows(batch: Batch) -> dict[str, Any]:
    """The batch with one row [Q·G, ...] for each completion; a batch of rows is unchanged.

    Entries that are not arrays of groups (running means, a gradient's weights) are unchanged.
    """
    if not is_grouped(batch):
        return dict(batch)
    shape = check_tokens(batch, "B G T")[:2]
    flat = lambda x: jnp.reshape(x, (-1, *np.shape(x)[2:])) if np.shape(x)[:2] == shape else x
    return jax.tree.map(flat, dict(batch))


def predict_completions(
    forward: Forward, params: Any, batch: Batch, key: jax.Array | None = None
) -> Prediction:
    """The Prediction of a grouped batch's completions, hidden [Q·G, N, D]: N from `completion_mask`.

    The forward gets one row for each group: the T - N tokens of the prompt, then the last N tokens of all
    completions, each at its own positions. Other columns are those of a group's first row. Completion
    token 0 is predicted by the prompt's last hidden state.

    Raises:
        ValueError: for a forward without `branches`, or a mask that leaves no prompt.
    """
    count, size, length = check_tokens(batch, "B G T")
    mask = np.shape(batch["completion_mask"])
    check_column(batch, "completion_mask", (count, size, mask[-1]), "completions in groups")
    if mask[-1] >= length:
        raise ValueError(f"completions in groups: {mask[-1]} tokens leave none of {length}.")
    _check_branches(forward)
    branches = Branches(length - mask[-1], size)

    def row(x):
        x = jnp.asarray(x)
        own = x[:, :, branches.trunk :].reshape(count, -1)
        return jnp.concatenate([x[:, 0, : branches.trunk], own], axis=1)

    positions = jnp.broadcast_to(jnp.arange(length), (count, size, length))
    whole = {"positions": positions} | {
        name: batch[name] for name in ("tokens", "positions", "segment_ids") if name in batch
    }
    groups = lambda x: np.shape(x)[:2] == (count, size)
    rest = {k: x[:, 0] for k, x in batch.items() if k not in whole and groups(x)}
    found = predict(forward, params, rest | jax.tree.map(row, whole), key, branches=branches)
    hidden = found.hidden[:, branches.trunk :].reshape(count, size, mask[-1], -1)
    first = found.hidden[:, branches.trunk - 1][:, None, None]
    first = jnp.broadcast_to(first, (*hidden.shape[:2], 1, hidden.shape[-1]))
    hidden = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    return found.replace(hidden=hidden.reshape(-1, *hidden.shape[2:]))


def _check_branches(forward):
    check_forward(forward)
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.name == "branches" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"completions in groups: the forward {getattr(forward, '__qualname__', forward)} has no "
            "argument `branches`, so its rows cannot share a prompt; decoders can. Use a batch of rows: "
            "collect(..., share_prompts=None)."
        )
