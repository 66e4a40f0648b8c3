"""Writes merged models, reads them again and compares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.adapters.read_back import Difference, check_same
from jaxft.checkpoints.gguf_adapter import load_gguf_adapter, save_gguf_adapter
from jaxft.checkpoints.gguf_write import Kind, save_gguf
from jaxft.checkpoints.models import Params, load_model, save_model
from jaxft.models import FAMILIES, Decoder, Family, family_of, is_stacked
from jaxft.weights import Frozen, LoraWeight, is_weight


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
    """Saves adapted params by `save_model`, then compares the files' logits with those of the params.

    Args:
        path: the directory.
        model: the decoder.
        params: of either layout; weights are written dense, in the data type of their base.
        tokenizer_from: see save_model.
        mesh: onto which the copy is read.
        tokens: see jaxft.adapters.logit_difference.
        families: see load_model.

    Raises:
        AdapterError: if a logit differs by more than sqrt(eps) times the largest, with eps of the files'
            data type.
    """
    save_model(path, model, params, tokenizer_from=tokenizer_from, families=families)
    stacked = is_stacked(params, family_of(model.config, families).layers)
    _, loaded = load_model(path, mesh=mesh, scan_layers=stacked, families=families)
    eps = lambda leaf: float(jnp.finfo(leaf.dtype).eps)
    coarsest = max(jax.tree.leaves(loaded), key=eps)
    return check_same(str(path), model, params, loaded, dtype=coarsest.dtype, tokens=tokens)


def save_merged_gguf(
    path: str | os.PathLike,
    model: Decoder,
    params: Params,
    *,
    kind: Kind = "bf16",
    tokenizer: Any = None,
    name: str = "",
    tokens: Any = None,
    families: Sequence[Family] = FAMILIES,
) -> Difference:
    """Saves adapted params by `save_gguf`, then compares the file's logits with those of the params.

    Args: see save_gguf, and `tokens` in jaxft.adapters.logit_difference.

    Raises:
        AdapterError: see save_merged; Q8_0 may differ as much as bfloat16.
        CheckpointError: see save_gguf.
    """
    options = {"kind": kind, "tokenizer": tokenizer, "name": name, "families": families}
    save_gguf(path, model, params, **options)
    stacked = is_stacked(params, family_of(model.config, families).layers)
    _, loaded = load_model(path, scan_layers=stacked, families=families)
    dtype = {"f32": jnp.float32, "f16": jnp.float16}.get(kind, jnp.bfloat16)
    return check_same(str(path), model, params, loaded, dtype=dtype, tokens=tokens)


def save_checked_gguf_adapter(
    path: str | os.PathLike,
    model: Decoder,
    params: Params,
    base: Params | None = None,
    *,
    name: str = "",
    tokens: Any = None,
    families: Sequence[Family] = FAMILIES,
) -> Difference:
    """Saves by `save_gguf_adapter`, then compares the logits of base plus file with those of the params.

    Args:
        path: the file.
        model: the decoder.
        params: with LoRA.
        base: the params before they were adapted, for PiSSA (see jaxft.adapters.save_adapter);
            None: the kernels under the LoRA.
        name: see save_gguf_adapter.
        tokens: see jaxft.adapters.logit_difference.
        families: see load_model.

    Raises:
        AdapterError: see save_gguf_adapter and save_merged.
    """
    save_gguf_adapter(path, model.config, params, base=base, name=name, families=families)
    if base is None:
        base = jax.tree.map(_under, params, is_leaf=is_weight)
    loaded = load_gguf_adapter(path, model.config, base, families=families)
    return check_same(str(path), model, params, loaded, tokens=tokens)


def _under(node):
    if isinstance(node, Frozen):
        return node.value
    return node.base if isinstance(node, LoraWeight) else node
