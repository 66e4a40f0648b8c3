"""VERA: two vectors per layer, around two random matrices that all layers share."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import Model, numpy, short_names, single, targeted
from jaxft.weights import VeraWeight, vera_tables

_A, _B = "base_model.vera_A", "base_model.vera_B"


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, VeraWeight]:
    """path -> weight; takes vera_lambda_d [R], vera_lambda_b [out], vera_A [R, in] and vera_B [out, R].

    A file without the matrices (save_projection false) is completed from projection_prng_key.
    """
    chosen = set(targeted(settings, tensors, model))
    linears = [linear for linear in model.linears if linear.name in chosen]
    if not linears:
        return {}
    rank = settings["r"]
    rows, columns = max(n.inputs for n in linears), max(n.outputs for n in linears)
    if settings["save_projection"]:
        a = jnp.asarray(take(tensors, _A, (rank, rows)).T)
        b = jnp.asarray(take(tensors, _B, (columns, rank)).T)
    else:
        a, b = vera_tables((rows, columns), rank, settings["projection_prng_key"] or 0)
    found = {}
    for linear in linears:
        d = jnp.asarray(take(tensors, linear.key("vera_lambda_d"), (rank,)))
        e = take(tensors, linear.key("vera_lambda_b"), (linear.outputs,))
        for path, kernel, part in linear.parts():
            own = b if part.start == 0 else b[:, part]
            found[path] = VeraWeight(kernel, a, own, d, jnp.asarray(e[part]))
    return found


def write(model: Model, found: Mapping[str, VeraWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors).

    Raises:
        AdapterError: for kernels that do not share their matrices or ranks.
    """
    weights = list(found.values())
    rows, columns = (max(w.shape[axis] for w in weights) for axis in (0, 1))
    a = numpy(max((w.a for w in weights), key=len)[:rows])
    b = numpy(max((w.b for w in weights), key=lambda leaf: leaf.shape[1])[:, :columns])
    chosen, tensors = [], {_A: a.T, _B: b.T}
    for linear in model.linears:
        parts = [found.get(path) for path in linear.paths]
        if all(part is None for part in parts):
            continue
        weight = single(linear, parts, "VeRA")
        height, width = weight.shape
        same = np.array_equal(numpy(weight.a[:height]), a[:height])
        if not same or not np.array_equal(numpy(weight.b[:, :width]), b[:, :width]):
            raise AdapterError(
                f"{linear.name!r} does not share the random matrices of other layers, but PEFT has one pair; "
                "make the adapter with vera(shape=largest_shape(params, pattern))."
            )
        tensors[linear.key("vera_lambda_d")] = numpy(weight.d)
        tensors[linear.key("vera_lambda_b")] = numpy(weight.e)
        chosen.append(linear.name)
    return {
        "r": a.shape[1],
        "target_modules": short_names((linear.name for linear in model.linears), chosen),
        "save_projection": True,
        "projection_prng_key": 0,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "fan_in_fan_out": model.conv1d,
        "bias": "none",
        "init_weights": True,
    }, tensors
