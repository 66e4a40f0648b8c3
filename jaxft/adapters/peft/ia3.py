"""IA3: learned scales of outputs, and of the inputs of feedforward_modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import Model, numpy, short_names, single, targeted
from jaxft.weights import ScaledWeight


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, ScaledWeight]:
    """path -> weight; takes ia3_l, [out, 1] or, of feedforward_modules, [1, in]."""
    chosen = set(targeted(settings, tensors, model))
    found = {}
    for linear in model.linears:
        if linear.name not in chosen:
            continue
        if _is_feedforward(settings["feedforward_modules"], linear.name):
            scale = take(tensors, linear.key("ia3_l"), (1, linear.inputs))[0]
            found |= {
                path: ScaledWeight(kernel, jnp.asarray(scale), "input")
                for path, kernel, _ in linear.parts()
            }
        else:
            scale = take(tensors, linear.key("ia3_l"), (linear.outputs, 1))[:, 0]
            found |= {
                path: ScaledWeight(kernel, jnp.asarray(scale[columns]), "output")
                for path, kernel, columns in linear.parts()
            }
    return found


def write(model: Model, found: Mapping[str, ScaledWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors)."""
    tensors, chosen = {}, {"input": [], "output": []}
    for linear in model.linears:
        parts = [found.get(path) for path in linear.paths]
        known = [part for part in parts if part is not None]
        if not known:
            continue
        if any(part.side == "input" for part in known):
            scale = numpy(single(linear, parts, "(IA)^3").scale)[None]
        else:
            ones = lambda kernel: np.ones(kernel.shape[1], np.float32)
            pairs = zip(linear.kernels, parts, strict=True)
            scales = [ones(k) if part is None else numpy(part.scale) for k, part in pairs]
            scale = np.concatenate(scales)[:, None]
        tensors[linear.key("ia3_l")] = scale
        chosen[known[0].side].append(linear.name)
    names = [linear.name for linear in model.linears]
    inputs, outputs = (short_names(names, chosen[side]) for side in ("input", "output"))
    return {
        "target_modules": sorted(inputs + outputs),
        "feedforward_modules": inputs,
        "fan_in_fan_out": model.conv1d,
        "init_ia3_weights": True,
    }, tensors


def _is_feedforward(names, module) -> bool:
    if names is None:
        raise AdapterError("feedforward_modules is null; PEFT writes a list: name the modules.")
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)
