"""LoRA on experts: target_parameters of PEFT, and modules of single experts as transformers 4 had them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import PREFIX, Grouped, Model, numpy, pattern, targeted
from jaxft.weights import DoraWeight, LoraWeight

_LAYER = (
    r"^.*\.layers\.\d+\."  # before the rest of a parameter's name, as it is in target_parameters
)


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LoraWeight]:
    """path -> weight [E, ...] of the experts that target_parameters or target_modules name.

    A parameter has lora_A [E R, in], R rows of each expert, and lora_B [out, R E], in which column r E + e
    is column r of expert e. With two parameters adapted on one module, the first one's names have
    "base_layer". Adapters of single experts (module "experts.3.w1") were written under transformers 4; gate
    and up then become one LoRA of the summed rank.

    Raises:
        AdapterError: if target_parameters names nothing here, or options that PEFT refuses on parameters.
    """
    names = settings["target_parameters"] or ()
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"target_parameters={names!r} must be a list of names.")
    chosen = [group for group in model.grouped if _named(names, group.name)]
    lost = [n for n in names if not any(_named([n], group.name) for group in model.grouped)]
    if lost:
        known = sorted({group.name.rpartition(".")[2] for group in model.grouped})
        raise AdapterError(
            f"target_parameters={lost!r} names no parameters of mixture-of-experts layers of this model; "
            f"jaxft knows {', '.join(known) or 'none, since it has no experts'}."
        )
    single = set(
        targeted(
            settings, tensors, model, (m for g in model.grouped for ms in g.modules for m in ms)
        )
    )
    single = {name for name in single if f"{PREFIX}{name}.lora_A.weight" in tensors}
    alone = [group for group in model.grouped if any(n in single for n in group.modules[0])]
    if (chosen or alone) and (settings["use_dora"] or settings["lora_bias"]):
        raise AdapterError("use_dora and lora_bias on experts are not supported, as in PEFT.")
    found = {group.path: _read_parameter(settings, tensors, group, chosen) for group in chosen}
    return found | {group.path: _read_modules(settings, tensors, group) for group in alone}


def write(
    model: Model, found: Mapping[str, Any]
) -> tuple[Tensors, dict[str, int], dict[str, float], list[str]]:
    """(tensors, ranks and alphas by parameter, target_parameters) of the experts among `found`."""
    chosen = [group for group in model.grouped if group.path in found]
    tensors: Tensors = {}
    for group in chosen:
        weight = found[group.path]
        if isinstance(weight, DoraWeight):
            raise AdapterError(
                f"{group.name!r} trains as DoRA, which PEFT does not have on experts; use save_native."
            )
        a, b = numpy(weight.a), numpy(weight.b)  # [E, in, R] and [E, R, out]
        first, second = _keys(group, chosen)
        tensors[first] = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
        tensors[second] = b.transpose(2, 1, 0).reshape(b.shape[2], -1)
    ranks = {group.name: found[group.path].rank for group in chosen}
    alphas = {group.name: found[group.path].alpha for group in chosen}
    return tensors, ranks, alphas, _short(model.grouped, chosen)


def _read_parameter(settings, tensors, group: Grouped, chosen) -> LoraWeight:
    rank, alpha = _scale(settings, group.name)
    count, inputs, outputs = group.kernel.shape
    first, second = _keys(group, chosen)
    a = take(tensors, first, (count * rank, inputs)).reshape(count, rank, inputs)
    b = take(tensors, second, (outputs, rank * count)).reshape(outputs, rank, count)
    return _weight(group, a.transpose(0, 2, 1), b.transpose(2, 1, 0), alpha)


def _read_modules(settings, tensors, group: Grouped) -> LoraWeight:
    count, inputs, outputs = group.kernel.shape
    width = outputs // len(group.modules[0])
    scales = {_scale(settings, name) for names in group.modules for name in names}
    if len(scales) > 1:
        raise AdapterError(
            f"{group.name!r}: the adapters of single experts have several ranks or alphas, which one stacked "
            "LoRA cannot hold; merge them in PEFT."
        )
    ((rank, alpha),) = scales
    parts = len(group.modules[0])
    a = np.zeros((count, inputs, parts * rank), np.float32)
    b = np.zeros((count, parts * rank, outputs), np.float32)
    for e, names in enumerate(group.modules):
        for i, name in enumerate(names):
            key, mine = f"{PREFIX}{name}.lora_", slice(i * rank, (i + 1) * rank)
            a[e, :, mine] = take(tensors, f"{key}A.weight", (rank, inputs)).T
            b[e, mine, i * width : (i + 1) * width] = take(
                tensors, f"{key}B.weight", (width, rank)
            ).T
    return _weight(group, a, b, alpha * parts)


def _weight(group: Grouped, a: np.ndarray, b: np.ndarray, alpha: float) -> LoraWeight:
    return LoraWeight(group.kernel, jnp.asarray(a), jnp.asarray(b), alpha)


def _scale(settings: Settings, name: str) -> tuple[int, float]:
    """(rank, alpha) of a module or parameter; rsLoRA's factor is in alpha."""
    rank = pattern(settings["rank_pattern"], name, settings["r"])
    alpha = float(pattern(settings["alpha_pattern"], name, settings["lora_alpha"]))
    return rank, alpha * (rank**0.5 if settings["use_rslora"] else 1.0)


def _keys(group: Grouped, chosen: list[Grouped]) -> tuple[str, str]:
    """The names of its tensors. PEFT wraps the module once for each parameter, in their order."""
    beside = [other.name for other in chosen if other.module == group.module]
    inner = "base_layer." * (len(beside) - 1 - beside.index(group.name))
    return tuple(f"{PREFIX}{group.module}.{inner}lora_{x}.weight" for x in "AB")


def _short(groups: Iterable[Grouped], chosen: list[Grouped]) -> list[str]:
    """target_parameters: the name in every layer, or full names where only some layers are adapted."""
    last = lambda group: group.name.rpartition(".")[2]
    partial = {last(group) for group in groups if group not in chosen}
    return sorted({g.name if last(g) in partial else re.sub(_LAYER, "", g.name) for g in chosen})


def _named(names: Iterable[str], parameter: str) -> bool:
    return any(parameter == name or parameter.endswith(f".{name}") for name in names)
