"""Leaves that train whole: LN_TUNING, and modules_to_save and bias beside another adapter."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.base_tensors import untied
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import PREFIX, Model, short_names, targeted
from jaxft.models import Entry
from jaxft.models.transformer import EMBEDDING
from jaxft.parallel import to_host
from jaxft.weights import to_dense

_COPY = "ln_tuning_layers"


def read_norms(settings: Settings, tensors: Tensors, model: Model) -> dict[str, jax.Array]:
    """path -> leaf of the modules that LN_TUNING saves, which must be norms."""
    found = {}
    for module in targeted(settings, tensors, model, model.leaves):
        if not _is_norm(model, module):
            raise AdapterError(f"LN_TUNING of {module!r}: only norms are supported.")
        for leaf, entry in model.leaves[module].items():
            found |= _take(tensors, f"{PREFIX}{module}.{_COPY}.{leaf}", entry, model)
    return found


def write_norms(model: Model, found: Mapping[str, jax.Array]) -> tuple[Settings, Tensors]:
    """(settings, tensors) of norms that train."""
    trained = {
        m for m, leaves in model.leaves.items() if any(_trains(e, found) for e in leaves.values())
    }
    tensors = {
        f"{PREFIX}{module}.{_COPY}.{leaf}": _tensor(entry, model)
        for module in trained
        for leaf, entry in model.leaves[module].items()
    }
    return {"target_modules": short_names(model.leaves, trained)}, tensors


def only_norms(model: Model, found: Mapping[str, jax.Array]) -> bool:
    """Returns whether all trainable leaves are in norms."""
    norms = [m for m in model.leaves if _is_norm(model, m)]
    known = {path for m in norms for entry in model.leaves[m].values() for path in entry.paths}
    return found.keys() <= known


def read_whole(
    settings: Settings, tensors: Tensors, model: Model, adapted: Mapping
) -> dict[str, jax.Array]:
    """path -> leaf of modules_to_save, and of the biases that train under bias="all" or "lora_only"."""
    found, saved = {}, set()
    for module, leaves in model.leaves.items():
        if _is_saved(settings.get("modules_to_save") or [], module):
            saved.add(module)
            for leaf, entry in leaves.items():
                found |= _take(tensors, f"{PREFIX}{module}.{leaf}", entry, model)
    if model.tied and EMBEDDING in found and f"{PREFIX}{model.head}.weight" not in tensors:
        raise AdapterError(untied(model, "modules_to_save has only the embeddings"))
    bias = settings.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"bias={bias!r} is not supported; expected none, all or lora_only.")
    layers = _adapted_modules(model, adapted)
    for module, leaves in model.leaves.items():
        wanted = module in layers if bias == "lora_only" else bias == "all"
        if wanted and "bias" in leaves and module not in saved:
            found |= _take(tensors, _bias_key(module, layers), leaves["bias"], model)
    return found


def write_whole(
    model: Model, found: Mapping[str, jax.Array], adapted: Mapping, biases: bool
) -> tuple[Settings, Tensors]:
    """(settings, tensors) of plain leaves that train beside adapters.

    Args:
        model: with the leaves.
        found: path -> leaf that trains.
        adapted: path -> weight of the adapters.
        biases: whether the type is LoRA, which has the options `bias` and `ensure_weight_tying`.

    Raises:
        AdapterError: for a choice of leaves that PEFT has no option for.
    """
    layers, saved, tensors, lone = _adapted_modules(model, adapted), [], {}, set()
    for module, leaves in model.leaves.items():
        trained = {leaf for leaf, entry in leaves.items() if _trains(entry, found)}
        if trained == leaves.keys():
            saved.append(module)
            tensors |= {f"{PREFIX}{module}.{n}": _tensor(e, model) for n, e in leaves.items()}
        elif trained == {"bias"}:
            lone.add(module)
            tensors[_bias_key(module, layers)] = _tensor(leaves["bias"], model)
        elif trained:
            raise AdapterError(f"{module!r} trains in part; PEFT saves modules whole.")
    settings: Settings = {"modules_to_save": saved or None}
    if model.tied and EMBEDDING in found:
        if not biases:  # PEFT has the option only for LoRA.
            raise AdapterError(
                "the embedding trains, which is tied to the output projection; PEFT would untie them. Save "
                "the whole model with save_model."
            )
        settings["ensure_weight_tying"] = True
        tensors[f"{PREFIX}{model.head}.weight"] = to_host(to_dense(model.nodes[EMBEDDING]))
    if biases:
        having = {m for m, leaves in model.leaves.items() if "bias" in leaves and m not in saved}
        choices = {"none": set(), "lora_only": having & layers, "all": having}
        bias = next((name for name, modules in choices.items() if modules == lone), None)
        if bias is None:
            raise AdapterError("PEFT trains no biases, all biases, or those of adapted layers.")
        settings["bias"] = bias
    elif lone:
        raise AdapterError(f"the bias of {sorted(lone)[0]!r} trains; PEFT has that only for LoRA.")
    return settings, tensors


def _adapted_modules(model, adapted) -> set[str]:
    return {linear.name for linear in model.linears if any(p in adapted for p in linear.paths)}


def _bias_key(module, layers) -> str:
    return f"{PREFIX}{module}.base_layer.bias" if module in layers else f"{PREFIX}{module}.bias"


def _is_norm(model, module) -> bool:
    return next(iter(model.leaves[module].values())).paths[0].split("/")[-2].endswith("norm")


def _is_saved(names, module) -> bool:
    """Returns whether the name of the module, or of an outer one, ends as modules_to_save says."""
    parts = module.split(".")
    outer = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(name.endswith(end) for end in names for name in outer)


def _trains(entry: Entry, found) -> bool:
    trained = [path in found for path in entry.paths]
    if any(trained) and not all(trained):
        raise AdapterError(f"{entry.name!r} trains in part; PEFT saves tensors whole.")
    return all(trained)


def _tensor(entry: Entry, model: Model) -> np.ndarray:
    leaf = np.concatenate([to_host(to_dense(model.nodes[path])) for path in entry.paths], -1)
    return leaf.T if entry.transposed else leaf


def _take(tensors, key, entry: Entry, model: Model) -> dict[str, jax.Array]:
    shapes = [model.nodes[path].shape for path in entry.paths]
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    tensor = take(tensors, key, shape[::-1] if entry.transposed else shape, None)
    leaf = tensor.T if entry.transposed else tensor
    parts = np.split(leaf, np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1)
    return {path: jnp.asarray(part) for path, part in zip(entry.paths, parts, strict=True)}
