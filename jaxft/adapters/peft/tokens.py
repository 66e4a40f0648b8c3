"""TRAINABLE_TOKENS, and trainable_token_indices beside LoRA: rows of the embeddings that train."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.base_tensors import untied
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import PREFIX, Linear, Model, numpy, short_names, targeted
from jaxft.models.transformer import EMBEDDING
from jaxft.parallel import to_host
from jaxft.weights import PacaWeight

_ROWS, _BESIDE = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, PacaWeight]:
    """path -> the embedding with trained rows; takes trainable_tokens_delta [tokens, D]."""
    targets = settings["target_modules"]
    if targets is None:
        settings = settings | {"target_modules": ["embed_tokens", "wte"]}
    chosen = targeted(settings, tensors, model, [n.name for n in model.embeddings] + [model.head])
    found = {}
    for linear in model.embeddings:
        if linear.name in chosen:
            found |= _rows(tensors, linear, settings["token_indices"], _ROWS)
    if model.head in chosen and not model.tied:
        raise AdapterError(
            f"token_indices of {model.head!r} are not supported, only those of embeddings."
        )
    _take_tied(tensors, model, found, _ROWS)
    return found


def write(model: Model, found: Mapping[str, PacaWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors) of one embedding whose rows train."""
    (linear,) = [n for n in model.embeddings if n.paths[0] in found]
    tensors, indices = _tensors(model, linear, found, _ROWS)
    if linear.paths == (EMBEDDING,) and model.tied:
        tensors[f"{PREFIX}{model.head}.{_ROWS}"] = tensors[linear.key(_ROWS)]
    return {
        "target_modules": [linear.name],
        "token_indices": indices,
        "init_weights": True,
    }, tensors


def read_beside(settings: Settings, tensors: Tensors, model: Model) -> dict[str, PacaWeight]:
    """path -> the embedding with trained rows, from trainable_token_indices beside LoRA."""
    wanted = settings["trainable_token_indices"]
    if wanted is None:
        return {}
    if isinstance(wanted, list):
        names = [n.name for n in model.embeddings if n.paths == (EMBEDDING,)]
        wanted = dict.fromkeys(names, wanted)
    found = {}
    for name, indices in wanted.items():
        one = {"target_modules": [name]}
        matched = [n for n in model.embeddings if targeted(one, tensors, model, [n.name])]
        if not matched:
            raise AdapterError(
                f"trainable_token_indices of {name!r}: supported only for embeddings, "
                f"{', '.join(n.name for n in model.embeddings)}."
            )
        for linear in matched:
            found |= _rows(tensors, linear, indices, _BESIDE)
    _take_tied(tensors, model, found, _BESIDE)
    return found


def write_beside(model: Model, found: Mapping[str, PacaWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors) of embeddings whose rows train beside LoRA."""
    chosen = [n for n in model.embeddings if n.paths[0] in found]
    tensors, wanted = {}, {}
    names = [n.name for n in (*model.linears, *model.embeddings)]
    for linear in chosen:
        own, wanted[short_names(names, [linear.name])[0]] = _tensors(model, linear, found, _BESIDE)
        tensors |= own
    return ({"trainable_token_indices": wanted} if wanted else {}), tensors


def _rows(tensors, linear: Linear, indices, name) -> dict[str, PacaWeight]:
    count = linear.inputs
    whole = isinstance(indices, list) and all(type(i) is int and 0 <= i < count for i in indices)
    if not whole or not indices or len(set(indices)) < len(indices):
        raise AdapterError(
            f"the token indices of {linear.name!r} must be a list of distinct numbers in 0..{count - 1}, got "
            f"{str(indices)[:80]}."
        )
    rows = take(tensors, linear.key(name), (len(indices), linear.outputs))
    places = jnp.asarray(np.array(indices, np.int32))
    # Scale 1: P is the rows themselves.
    weight = PacaWeight(linear.kernels[0], jnp.asarray(rows), places, float(len(indices)))
    return {linear.paths[0]: weight}


def _tensors(model: Model, linear: Linear, found, name):
    weight = found[linear.paths[0]]
    rows = numpy(weight.rows) * np.float32(weight.alpha / weight.rank)
    return {linear.key(name): rows}, [int(i) for i in to_host(weight.indices)]


def _take_tied(tensors: Tensors, model: Model, found, name) -> None:
    """Removes the rows of a tied output projection, which must equal those of the embeddings."""
    rows = tensors.get(key := f"{PREFIX}{model.head}.{name}")
    if rows is None or not model.tied:
        return
    own = found.get(EMBEDDING)
    if own is None or not np.array_equal(rows.astype(np.float32), np.asarray(own.rows)):
        raise AdapterError(untied(model, f"{key!r} differs from that of the embeddings"))
    del tensors[key]
