"""Reads rows that are tokens already, with the columns that trainers and tokenizers put beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.messages import check_weight

# Columns of tokenised rows that say which tokens train: ours, TRL's and transformers'.
MASKS = ("loss_mask", "completion_mask", "assistant_masks")
TOKEN_COLUMNS = (*MASKS, "labels", "attention_mask", "position_ids")


def read_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"tokens"} without padding, and {"loss_mask"} if a column says which of them train.

    Masks are ours and TRL's (`MASKS`), or transformers' `labels`, in which -100 does not train. Padding is
    what `attention_mask` excludes.

    Raises:
        DataError: if a column has another length, or two of them, or the tokens, contradict each other.
    """
    tokens = row["tokens"]
    ids = _numbers(tokens, "tokens")
    if not len(ids):
        raise DataError("'tokens' is empty.", "schema")
    if ids.dtype.kind not in "iu":
        raise DataError(f"'tokens' must be whole numbers, got {tokens!r:.60}.", "schema")
    beside = {
        name: _numbers(row[name], name) for name in TOKEN_COLUMNS if row.get(name) is not None
    }
    for name, values in beside.items():
        if len(values) != len(ids):
            raise DataError(f"{len(values)} {name} values for {len(ids)} tokens.", "schema")
    masks = {name: beside[name] for name in MASKS if name in beside}
    if "labels" in beside:
        masks["labels"] = _labelled(ids, beside["labels"])
    name, mask = next(iter(masks.items()), ("", None))
    for other, values in masks.items():
        if not np.array_equal(values, mask):
            raise DataError(f"{name!r} and {other!r} choose different tokens; give one.", "schema")
    for weight in () if mask is None else mask.tolist():
        check_weight(weight, f"a value of {name}")
    kept = _attended(beside)
    made = {"tokens": tokens if kept == slice(None) else ids[kept].tolist()}
    return made if mask is None else made | {"loss_mask": mask[kept].tolist()}


def _labelled(ids, labels):
    """The mask of `labels` as transformers reads them: -100 where a token does not train, else the token."""
    trains = labels != -100
    if not np.array_equal(labels[trains], ids[trains]):
        raise DataError(
            "'labels' must equal 'tokens' or be -100 (they are not shifted); others cannot be trained on.",
            "schema",
        )
    return trains.astype(np.int32)


def _attended(beside):
    """The tokens without the padding on either side that an attention_mask marks."""
    mask, places = beside.get("attention_mask"), beside.get("position_ids")
    there = np.flatnonzero(mask) if mask is not None else None
    if there is not None and (not len(there) or len(there) != there[-1] + 1 - there[0]):
        raise DataError(
            "'attention_mask' must be 1 for the tokens and 0 for padding on either side.", "schema"
        )
    kept = slice(None) if there is None else slice(int(there[0]), int(there[-1]) + 1)
    if places is not None and len(places[kept]) > 1 and (np.diff(places[kept]) != 1).any():
        raise DataError(
            "'position_ids' restart, so 'tokens' holds several packed texts; give each its own row "
            "(--packing packs them without attention across).",
            "schema",
        )
    return kept


def _numbers(values, name):
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError, TypeError):
        array = np.zeros((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iufb":
        raise DataError(f"{name!r} must be a list of numbers, got {values!r:.60}.", "schema")
    return array
