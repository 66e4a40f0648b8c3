"""LORA: LoRA, rsLoRA, DoRA, on matrices and embeddings; PiSSA as its difference from the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft import experts, tokens
from jaxft.adapters.peft.base_tensors import untied
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.initial import with_initial_base
from jaxft.adapters.peft.model import (
    PREFIX,
    Linear,
    Model,
    numpy,
    pattern,
    patterns,
    short_names,
    targeted,
)
from jaxft.models.transformer import EMBEDDING
from jaxft.weights import DoraWeight, LoraWeight, PacaWeight, to_dense


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, Any]:
    """path -> weight, or bias; takes lora_A [R, in], lora_B [out, R] and lora_magnitude_vector [out].

    Embeddings have lora_embedding_A [R, V] and lora_embedding_B [D, R]. With lora_bias, lora_B has a bias
    [out], which is added to the layer's own bias, scaled by α/R. trainable_token_indices are rows.
    """
    if settings["lora_bias"] and (settings["use_dora"] or settings["bias"] != "none"):
        other = "use_dora=true" if settings["use_dora"] else f"bias={settings['bias']!r}"
        raise AdapterError(f"lora_bias=true with {other} is not supported.")
    matrices = (*model.linears, *model.embeddings)
    chosen = set(targeted(settings, tensors, model, (n.name for n in matrices)))
    found = {}
    for linear in matrices:
        if linear.name in chosen:
            found |= _read_one(settings, tensors, model, linear)
    found |= experts.read(settings, tensors, model)
    rows = tokens.read_beside(settings, tensors, model)
    for path in found.keys() & rows.keys():
        raise AdapterError(
            f"{path!r} has LoRA and trainable_token_indices, which cannot be combined."
        )
    found |= rows
    if model.tied:
        _take_tied(tensors, model, found.get(EMBEDDING))
    return found


def write(model: Model, found: Mapping[str, Any]) -> tuple[Settings, Tensors]:
    """(settings, tensors). GPT-2's query, key and value become one LoRA of the summed rank."""
    rows = {path: weight for path, weight in found.items() if isinstance(weight, PacaWeight)}
    factors = {path: weight for path, weight in found.items() if path not in rows}
    use_dora = {isinstance(weight, DoraWeight) for weight in factors.values()}
    if len(use_dora) > 1:
        raise AdapterError("LoRA and DoRA together: a PEFT file holds only one of them.")
    use_dora = use_dora.pop()
    tensors, ranks, alphas, parameters = experts.write(model, factors)
    for linear in (*model.linears, *model.embeddings):
        parts = [factors.get(path) for path in linear.paths]
        if all(part is None for part in parts):
            continue
        a, b, alpha = _join(linear, parts)
        first, second = _names(linear)
        tensors[linear.key(first)], tensors[linear.key(second)] = a.T, b.T
        if use_dora:
            if linear.embedding:
                raise AdapterError(
                    f"{linear.name!r} trains as DoRA, which is not supported on embeddings."
                )
            lengths = map(_length, linear.kernels, parts)
            tensors[linear.key("lora_magnitude_vector")] = np.concatenate(list(lengths))
        ranks[linear.name], alphas[linear.name] = a.shape[1], alpha
        if linear.paths == (EMBEDDING,) and model.tied:
            tensors[f"{PREFIX}{model.head}.lora_A.weight"] = b
            tensors[f"{PREFIX}{model.head}.lora_B.weight"] = a
    names = [linear.name for linear in (*model.linears, *model.embeddings)]
    settings = patterns(ranks, "r") | patterns(alphas, "lora_alpha")
    settings |= {
        "target_modules": short_names(names, ranks.keys() & {*names}),
        "lora_dropout": 0.0,
        "fan_in_fan_out": model.conv1d,
        "init_lora_weights": True,
        "use_dora": use_dora,
        "use_rslora": False,  # Its factor is in lora_alpha.
    }
    if parameters:
        settings["target_parameters"] = parameters
    if model.tied and EMBEDDING in factors:
        settings["ensure_weight_tying"] = True
    more, beside = tokens.write_beside(model, rows)
    return settings | more, tensors | beside


def _read_one(settings, tensors, model: Model, linear: Linear) -> dict[str, Any]:
    """path -> weight of the kernels of one matrix, and its bias if the adapter has one."""
    rank = pattern(settings["rank_pattern"], linear.name, settings["r"])
    alpha = float(pattern(settings["alpha_pattern"], linear.name, settings["lora_alpha"]))
    alpha *= rank**0.5 if settings["use_rslora"] else 1.0
    linear = with_initial_base(settings["init_lora_weights"], linear, rank, alpha / rank)
    first, second = _names(linear)
    a = take(tensors, linear.key(first), (rank, linear.inputs)).T
    b = take(tensors, linear.key(second), (linear.outputs, rank)).T
    length = None
    if settings["use_dora"]:
        if linear.embedding:
            raise AdapterError(f"use_dora on the embedding {linear.name!r} is not supported.")
        length = take(tensors, linear.key("lora_magnitude_vector"), (linear.outputs,))
    found = {}
    for path, kernel, columns in linear.parts():
        factors = jnp.asarray(a), jnp.asarray(b[:, columns])
        if length is None:
            found[path] = LoraWeight(kernel, *factors, alpha)
        else:
            found[path] = DoraWeight(kernel, *factors, jnp.asarray(length[columns]), alpha)
    if settings["lora_bias"] and not linear.embedding:
        found |= _bias(tensors, model, linear, alpha / rank)
    return found


def _bias(tensors, model: Model, linear: Linear, scale: float) -> dict[str, jax.Array]:
    """path -> the layer's bias plus that of lora_B."""
    added = scale * take(tensors, linear.key("lora_B.bias"), (linear.outputs,))
    entry = model.leaves[linear.name].get("bias")
    if entry is None:
        raise AdapterError(
            f"lora_bias=true adds a bias to {linear.name!r}, but the layers of this model have none; train "
            "without lora_bias, or use the adapter in PEFT."
        )
    found, start = {}, 0
    for path in entry.paths:
        own = to_dense(model.nodes[path])
        found[path] = own + jnp.asarray(added[start : start + len(own)], own.dtype)
        start += len(own)
    return found


def _take_tied(tensors: Tensors, model: Model, weight: Any) -> None:
    """Removes a tied output projection's adapter, which must be the embeddings' adapter, transposed."""
    keys = [f"{PREFIX}{model.head}.lora_{name}.weight" for name in "AB"]
    head = [tensors[key] for key in keys if key in tensors]
    if not head and not isinstance(weight, LoraWeight):
        return
    if len(head) < 2 or not isinstance(weight, LoraWeight):
        adapted = model.head if head else "embed_tokens"
        raise AdapterError(untied(model, f"LoRA is only on {adapted}"))
    pair = np.asarray(weight.b), np.asarray(weight.a)
    for key, tensor, own in zip(keys, head, pair, strict=True):
        if not np.array_equal(tensor.astype(np.float32), own):
            raise AdapterError(untied(model, f"{key!r} differs from that of the embeddings"))
        del tensors[key]


def _names(linear: Linear) -> tuple[str, str]:
    if linear.embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _join(linear: Linear, parts):
    """One (A [in, R], B [R, out], alpha) for the adapters of one matrix."""
    known = [part for part in parts if part is not None]
    scale = known[0].alpha / known[0].rank
    if any(part.alpha / part.rank != scale for part in known):
        raise AdapterError(f"{linear.name!r}: query, key and value need one alpha / rank.")
    b = np.zeros((sum(part.rank for part in known), linear.outputs), np.float32)
    row = 0
    for part, (_, _, columns) in zip(parts, linear.parts(), strict=True):
        if part is not None:
            b[row : row + part.rank, columns] = numpy(part.b)
            row += part.rank
    return np.concatenate([numpy(part.a) for part in known], axis=1), b, scale * len(b)


def _length(kernel, part):
    # Without an adapter, a column keeps its own length, which DoRA does not change.
    return (
        np.linalg.norm(numpy(to_dense(kernel)), axis=0) if part is None else numpy(part.magnitude)
    )
