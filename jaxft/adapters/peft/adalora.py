"""ADALORA: LoRA with a diagonal E between A and B; the pruned result is read as LoRA."""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import Linear, Model, targeted
from jaxft.weights import LoraWeight


def read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LoraWeight]:
    """path -> LoRA; takes lora_A [R, in], lora_E [R, 1] and lora_B [out, R].

    R is the rank that rank_pattern keeps of init_r. PEFT always divides by init_r + 1e-5. The result is
    saved as LORA.
    """
    chosen = set(targeted(settings, tensors, model))
    found = {}
    for linear in model.linears:
        if linear.name not in chosen:
            continue
        kept = _kept(settings, linear)
        a = take(tensors, linear.key("lora_A"), (kept, linear.inputs)).T
        e = take(tensors, linear.key("lora_E"), (kept, 1))[:, 0]
        b = take(tensors, linear.key("lora_B"), (linear.outputs, kept)).T
        if kept == 0:
            continue
        ranks = settings["init_r"]
        alpha = settings["lora_alpha"] if settings["lora_alpha"] > 0 else float(ranks)
        scale = alpha / (ranks + 1e-5)
        for path, kernel, columns in linear.parts():
            factors = jnp.asarray(a * e), jnp.asarray(b[:, columns])
            found[path] = LoraWeight(kernel, *factors, scale * kept)
    return found


def _kept(settings: Settings, linear: Linear) -> int:
    table = settings["rank_pattern"] or {}
    if not isinstance(table, dict):
        raise AdapterError(f"rank_pattern={table!r} must be an object of ranks that are kept.")
    for name, kept in table.items():
        if name.startswith(f"{linear.name}.lora_E"):  # Some versions append the adapter's name.
            if not isinstance(kept, list) or not all(isinstance(x, bool) for x in kept):
                raise AdapterError(f"rank_pattern[{name!r}] must be a list of true and false.")
            return sum(kept)
    return settings["init_r"]
