"""LORA: LoRA, rsLoRA, DoRA, and PiSSA as the difference that it makes."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, refuse, take
from jaxft.adapters.peft.model import (
    Linear,
    Model,
    numpy,
    pattern,
    patterns,
    short_names,
    targeted,
)
from jaxft.weights import DoraWeight, LoraWeight, to_dense

# What PEFT's LoRA can also do and changes what is computed.
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
    "velora_config",
)  # fmt: skip


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LoraWeight | DoraWeight]:
    """path -> weight; takes lora_A [R, in], lora_B [out, R] and lora_magnitude_vector [out]."""
    refuse(settings, *_REFUSED)
    chosen = set(targeted(settings, tensors, model))
    found = {}
    for linear in model.linears:
        if linear.name not in chosen:
            continue
        rank = pattern(settings.get("rank_pattern"), linear.name, settings["r"])
        alpha = float(pattern(settings.get("alpha_pattern"), linear.name, settings["lora_alpha"]))
        alpha *= rank**0.5 if settings.get("use_rslora") else 1.0
        a = take(tensors, linear.key("lora_A.weight"), (rank, linear.inputs)).T
        b = take(tensors, linear.key("lora_B.weight"), (linear.outputs, rank)).T
        length = None
        if settings.get("use_dora"):
            length = take(tensors, linear.key("lora_magnitude_vector"), (linear.outputs,))
        for path, kernel, columns in linear.parts():
            factors = jnp.asarray(a), jnp.asarray(b[:, columns])
            if length is None:
                found[path] = LoraWeight(kernel, *factors, alpha)
            else:
                found[path] = DoraWeight(kernel, *factors, jnp.asarray(length[columns]), alpha)
    return found


def write(model: Model, found: Mapping[str, LoraWeight | DoraWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors). GPT-2's query, key and value become one of the summed rank."""
    use_dora = {isinstance(weight, DoraWeight) for weight in found.values()}
    if len(use_dora) > 1:
        raise AdapterError("LoRA and DoRA side by side: PEFT has one or the other in a file.")
    use_dora = use_dora.pop()
    tensors, ranks, alphas = {}, {}, {}
    for linear in model.linears:
        parts = [found.get(path) for path in linear.paths]
        if all(part is None for part in parts):
            continue
        a, b, alpha = _join(linear, parts)
        tensors[linear.key("lora_A.weight")] = a.T
        tensors[linear.key("lora_B.weight")] = b.T
        if use_dora:
            lengths = map(_length, linear.kernels, parts)
            tensors[linear.key("lora_magnitude_vector")] = np.concatenate(list(lengths))
        ranks[linear.name], alphas[linear.name] = a.shape[1], alpha
    settings = patterns(ranks, "r") | patterns(alphas, "lora_alpha")
    return settings | {
        "target_modules": short_names((linear.name for linear in model.linears), ranks),
        "lora_dropout": 0.0,
        "fan_in_fan_out": model.conv1d,
        "init_lora_weights": True,
        "use_dora": use_dora,
        "use_rslora": False,  # Its factor is in lora_alpha.
    }, tensors


def _join(linear: Linear, parts):
    """One (A [in, R], B [R, out], alpha) of the adapters side by side in a matrix."""
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
    # Without an adapter the length of a column is its own, which DoRA leaves as it is.
    return (
        np.linalg.norm(numpy(to_dense(kernel)), axis=0) if part is None else numpy(part.magnitude)
    )
