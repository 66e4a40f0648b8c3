"""Checks of shapes while tracing, which refuse arrays that broadcasting or slicing would misread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, Any]


def check_tokens(batch: Batch, dims: str = "B T") -> tuple[int, ...]:
    """The shape of the batch's tokens, which the columns `loss_mask` and `segment_ids` must have too.

    Args:
        dims: names of the axes: "B T" for rows, "B G T" for groups.

    Raises:
        ValueError: for another number of axes, no rows, or a mask or segments of another shape.
    """
    shape, axes = np.shape(batch["tokens"]), ", ".join(dims.split())
    if len(shape) != len(dims.split()):
        raise ValueError(
            f"batch: tokens must be [{axes}], got {shape}; one sequence is a batch of one: tokens[None]. "
            "Groups [B, G, T] are for preferences and rewards, rows [B, T] for all other objectives."
        )
    if shape[0] == 0:
        raise ValueError(f"batch: tokens {shape} have no rows; leave empty batches out.")
    for name in ("loss_mask", "segment_ids"):
        if name in batch and np.shape(batch[name]) != shape:
            raise ValueError(
                f"batch: {name} {np.shape(batch[name])} must have the shape of tokens {shape}: a value for "
                "each token, for example by jnp.broadcast_to."
            )
    return shape


def check_group(batch: Batch, size: int, who: str) -> None:
    """Raises ValueError unless each record has `size` sequences."""
    shape = np.shape(batch["tokens"])
    if len(shape) == 3 and shape[1] != size:
        raise ValueError(
            f"{who}: tokens {shape} are groups of {shape[1]} sequences, expected [B, {size}, T]; a group of "
            "ranked completions must be made into pairs first, the chosen one before the rejected one."
        )


def check_column(batch: Batch, name: str, shape: tuple[int, ...], who: str) -> jax.Array:
    """batch[name] as an array; raises ValueError if it is missing or has another shape."""
    if name not in batch:
        raise ValueError(f"{who}: the batch has no {name!r} {shape}; it has {sorted(batch)}.")
    if np.shape(batch[name]) != shape:
        raise ValueError(
            f"{who}: {name} has shape {np.shape(batch[name])}, expected {shape}; reshape or repeat it, "
            "broadcasting would pair its values with others."
        )
    return jnp.asarray(batch[name])


def check_completion(batch: Batch, who: str) -> jax.Array:
    """The column `completion_mask` [B, N] of the last N of the T tokens of each row, N < T, as bools.

    Raises:
        ValueError: for another number of rows or axes, N = T, or complex numbers.
    """
    (rows, length), shape = check_tokens(batch), np.shape(batch["completion_mask"])
    mask = check_column(batch, "completion_mask", (rows, shape[-1] if shape else 0), who)
    if mask.shape[1] >= length:
        raise ValueError(
            f"{who}: {mask.shape[1]} response tokens leave none of {length} for the prompt; completion_mask "
            "covers only the last columns."
        )
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise ValueError(f"{who}: completion_mask must be bool or 0 and 1, got {mask.dtype}.")
    return mask > 0


def check_labels(batch: Batch, who: str) -> jax.Array:
    """The column `label` [B] as bools: True where it is above 0, so that 0/1 and -1/1 mean the same.

    Raises:
        ValueError: if it is missing, has another shape, or is neither bool nor integer: a score needs a
            threshold, which the user must choose.
    """
    labels = check_column(batch, "label", np.shape(batch["tokens"])[:1], who)
    if not (labels.dtype == bool or jnp.issubdtype(labels.dtype, jnp.integer)):
        raise ValueError(
            f"{who}: label must be bool or integer (above 0: desirable), got {labels.dtype}; compare scores "
            "with a threshold first: label=scores > 0.5."
        )
    return labels > 0


def check_forward(forward: Any) -> None:
    """Raises ValueError if `forward` is not a function, or is a model instead of its forward."""
    if hasattr(forward, "forward"):
        raise ValueError(
            f"forward: got a {type(forward).__name__} itself; pass its function: model.forward."
        )
    if not callable(forward):
        raise ValueError(
            f"forward: expected a function (params, batch, key) -> Prediction, got a "
            f"{type(forward).__name__}."
        )


def check_one_sequence(model: Any, who: str) -> None:
    """Raises ValueError for an encoder-decoder, whose hidden states are those of an answer, not of a text."""
    if hasattr(getattr(model, "config", None), "encoder"):
        family = getattr(model.config, "family", type(model).__name__)
        raise ValueError(
            f"{who}: {family} is an encoder-decoder, of which jaxft has no embeddings or scores of texts; "
            "use an encoder (BERT, RoBERTa) or a decoder."
        )


def check_hidden(hidden: jax.Array, tokens: tuple[int, ...]) -> None:
    """Raises ValueError unless there is one hidden state for each token."""
    shape = np.shape(hidden)
    if len(shape) != len(tokens) + 1 or shape[:-1] != tokens:
        expected = f"({', '.join(map(str, tokens))}, D)"
        raise ValueError(
            f"forward: hidden states {shape} for tokens {tokens}, expected {expected}: one for each token, "
            "the last one too. Drop those of a prompt, a prefix or an image in front of the tokens "
            "(prediction.at(slice(None), slice(P, None))), and shift nothing: objectives do."
        )
