"""PACA, the format of its authors' fork of PEFT (github.com/WooSunghyeon/paca)."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import (
    Model,
    no_conv1d,
    numpy,
    pattern,
    patterns,
    short_names,
    targeted,
)
from jaxft.parallel import to_host
from jaxft.weights import PacaWeight


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, PacaWeight]:
    """path -> weight; takes paca_w [out, R] and paca_indices [R]."""
    chosen = set(targeted(settings, tensors, model))
    found = {}
    for linear in model.linears:
        if linear.name not in chosen:
            continue
        no_conv1d(linear, "PaCA")
        rank = pattern(settings["rank_pattern"], linear.name, settings["r"])
        alpha = float(pattern(settings["alpha_pattern"], linear.name, settings["paca_alpha"]))
        rows = take(tensors, linear.key("paca_w"), (linear.outputs, rank)).T
        indices = take(tensors, linear.key("paca_indices"), (rank,), np.int32)
        if len(set(indices)) < rank or not all(0 <= i < linear.inputs for i in indices):
            raise AdapterError(
                f"{linear.key('paca_indices')!r} must be distinct and lie in 0..{linear.inputs - 1}."
            )
        kernel = linear.kernels[0]
        weight = PacaWeight(kernel, jnp.asarray(rows), jnp.asarray(indices), alpha)
        found[linear.paths[0]] = weight
    return found


def write(model: Model, found: Mapping[str, PacaWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors)."""
    tensors, chosen = {}, {}
    for linear in model.linears:
        if linear.paths[0] not in found:
            continue
        no_conv1d(linear, "PaCA")
        weight = chosen[linear.name] = found[linear.paths[0]]
        tensors[linear.key("paca_w")] = numpy(weight.rows).T
        tensors[linear.key("paca_indices")] = to_host(weight.indices).astype(np.int64)
    ranks = patterns({name: weight.rank for name, weight in chosen.items()}, "r")
    alphas = patterns({name: weight.alpha for name, weight in chosen.items()}, "paca_alpha")
    return ranks | alphas | {
        "target_modules": short_names((linear.name for linear in model.linears), chosen),
        "fan_in_fan_out": False,
        "bias": "none",
    }, tensors
