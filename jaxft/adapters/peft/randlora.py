"""RANDLORA: scales of random bases that all layers share; PEFT stores W^T, as torch does."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import Model, numpy, short_names, single, targeted
from jaxft.weights import RandloraWeight

_A, _B = "base_model.randlora_A", "base_model.randlora_B"


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, RandloraWeight]:
    """path -> weight; takes randlora_lambda [R, N], randlora_gamma [N, min], and the bases A and B.

    A is [R, 1, min of the largest sizes], B [their max, N, R]. PEFT repeats them for each layer.

    Raises:
        AdapterError: for a file without the bases, which torch's generator drew, or with several.
    """
    chosen = set(targeted(settings, tensors, model))
    linears = [linear for linear in model.linears if linear.name in chosen]
    if not linears:
        return {}
    if not settings["save_projection"]:
        raise AdapterError(
            "save_projection=false leaves the random bases out of the file, and torch's generator drew them "
            "in the machine's data type; save the adapter in PEFT with save_projection=true."
        )
    rank, alpha = settings["r"], float(settings["randlora_alpha"])
    rows, columns = max(n.inputs for n in linears), max(n.outputs for n in linears)
    small, large = min(rows, columns), max(rows, columns)
    a = jnp.asarray(take(tensors, _A, (rank, 1, small))[:, 0])
    b = jnp.asarray(take(tensors, _B, (large, -(-small // rank), rank)))
    found = {}
    for linear in linears:
        if len(linear.paths) > 1:
            raise AdapterError(
                f"{linear.name!r} holds query, key and value in one matrix, whose RandLoRA does not "
                "split into this model's kernels; merge it into its model with PEFT (merge_and_unload, "
                "save_pretrained)."
            )
        for name, own in (("randlora_A", a[:, None]), ("randlora_B", b)):
            copy = tensors.pop(linear.key(name), None)
            if copy is not None and not np.array_equal(copy.astype(np.float32), own):
                raise AdapterError(f"{linear.key(name)!r} is not that of {f'base_model.{name}'!r}.")
        side = min(linear.inputs, linear.outputs)
        count = -(-side // rank)
        scale = take(tensors, linear.key("randlora_lambda"), (rank, count))
        gamma = take(tensors, linear.key("randlora_gamma"), (count, side))
        factors = jnp.asarray(scale), jnp.asarray(gamma)
        found[linear.paths[0]] = RandloraWeight(linear.kernels[0], a, b, *factors, alpha)
    return found


def write(model: Model, found: Mapping[str, RandloraWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors), with the bases once; PEFT reports their copies as missing, but restores them.

    Raises:
        AdapterError: for kernels that do not share their bases, ranks or alphas.
    """
    weights = list(found.values())
    rows, columns = (max(w.shape[axis] for w in weights) for axis in (0, 1))
    small, large, rank = min(rows, columns), max(rows, columns), weights[0].rank
    widest = max(weights, key=lambda w: w.a.shape[1])
    a, b = numpy(widest.a)[:, :small], numpy(widest.b)[:large, : -(-small // rank)]
    tensors, chosen = {_A: a[:, None], _B: b}, []
    shares = lambda leaf, table: np.array_equal(leaf, table[tuple(map(slice, leaf.shape))])
    cut = lambda leaf, table: numpy(leaf)[tuple(map(slice, table.shape))]
    for linear in model.linears:
        parts = [found.get(path) for path in linear.paths]
        if all(part is None for part in parts):
            continue
        weight = single(linear, parts, "RandLoRA")
        alike = shares(cut(weight.a, a), a) and shares(cut(weight.b, b), b)
        if not alike or (weight.rank, weight.alpha) != (rank, weights[0].alpha):
            raise AdapterError(
                f"{linear.name!r} does not share the bases, rank and alpha of other layers, but PEFT has one "
                "of each for all; make the adapter with randlora(shape=largest_shape(params, pattern))."
            )
        tensors[linear.key("randlora_lambda")] = numpy(weight.scale)
        tensors[linear.key("randlora_gamma")] = numpy(weight.gamma)
        chosen.append(linear.name)
    alpha = weights[0].alpha
    return {
        "r": rank,
        "randlora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": short_names((linear.name for linear in model.linears), chosen),
        "save_projection": True,
        "projection_prng_key": 0,
        "randlora_dropout": 0.0,
        "fan_in_fan_out": model.conv1d,
        "bias": "none",
        "init_weights": True,
    }, tensors
