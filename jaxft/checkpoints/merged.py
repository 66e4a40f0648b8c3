"""Merged models that are written, read again and compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.adapters.read_back import Difference, check_same
from jaxft.checkpoints.models import Params, load_model, save_model
from jaxft.models import FAMILIES, Decoder, Family, family_of, is_stacked


def save_merged(
    path: str | os.PathLike,
    model: Decoder,
    params: Params,
    *,
    tokenizer_from: Any = None,
    mesh: Mesh | None = None,
    tokens: Any = None,
    families: Sequence[Family] = FAMILIES,
) -> Difference:
    """`save_model` of adapted params, then the logits of what is on the disk against theirs.

    Args:
        path: the directory.
        model: the decoder.
        params: of either layout; weights are written dense, in the data type of their base.
        tokenizer_from: see save_model.
        mesh: over which the copy is read.
        tokens: see jaxft.adapters.logit_difference.
        families: see load_model.

    Raises:
        AdapterError: if a logit differs by more than sqrt(eps) of the largest, eps that of the data
            type of the files.
    """
    save_model(path, model, params, tokenizer_from=tokenizer_from, families=families)
    stacked = is_stacked(params, family_of(model.config, families).layers)
    _, loaded = load_model(path, mesh=mesh, scan_layers=stacked, families=families)
    eps = lambda leaf: float(jnp.finfo(leaf.dtype).eps)
    coarsest = max(jax.tree.leaves(loaded), key=eps)
    return check_same(str(path), model, params, loaded, dtype=coarsest.dtype, tokens=tokens)
