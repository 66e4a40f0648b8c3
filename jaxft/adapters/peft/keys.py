"""Converts tensor names as other tools write them to the names that PEFT saves."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Tensors
from jaxft.adapters.peft.model import PREFIX, Model

# torch.compile, FSDP and activation checkpointing wrap modules in others.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARTS = (
    "lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|hada_w1_a|hada_w1_b|"
    "hada_w2_a|hada_w2_b|lokr_w1|lokr_w2|lokr_w2_a|lokr_w2_b|vera_A|vera_B|vera_lambda_b|vera_lambda_d|"
    "randlora_A|randlora_B|randlora_lambda|randlora_gamma|oft_R|oft_embedding_R|boft_R|boft_s|ia3_l|"
    "hra_u|vblora_logits_A|vblora_logits_B|vblora_vector_bank|paca_w|paca_indices|"
    "ln_tuning_layers|modules_to_save|trainable_tokens_delta"
)
# A state dict that was saved unchanged has the adapter's name after each of its parts.
_ADAPTER = re.compile(rf"\.({_PARTS})\.(?!(?:weight|bias)$)([^.]+)(?=\.(?:weight|bias)$|$)")
# The prefixes of a bare model's names within a larger model.
_PREFIXES = {"model", "transformer", "language_model", "bert", "roberta", "vit"}
# Copies of base tensors in such a state dict.
_COPIES = re.compile(
    r"\.(original_module\.(weight|bias)|token_adapter\.trainable_tokens_original\..*|ranknum(\..*)?)$"
)


def canonical(tensors: Tensors, model: Model) -> Tensors:
    """The tensors under PEFT's names, with the modules of this model.

    Names may have a wrapper's part ("_orig_mod."), the adapter's name ("lora_A.default.weight"), no
    leading "base_model.model.", or a prefix more or less than the model's names ("layers.0" of a bare
    model).

    Raises:
        AdapterError: if the file holds several adapters, or one tensor under two names.
    """
    modules = {linear.name for linear in (*model.linears, *model.embeddings)} | {*model.leaves}
    modules.add(model.head)
    for group in model.grouped:
        modules |= {group.module, *(name for names in group.modules for name in names)}
    unwrapped = {key: _WRAPPERS.sub("", key).removeprefix("module.") for key in tensors}
    adapters = {match[2] for name in unwrapped.values() for match in _ADAPTER.finditer(name)}
    if len(adapters) > 1:
        raise AdapterError(
            f"the file holds the adapters {', '.join(sorted(adapters))}; save a single one, with PEFT's "
            "save_pretrained(selected_adapters=[name])."
        )
    names: dict[str, str] = {}
    for key, name in unwrapped.items():
        if _COPIES.search(name):
            continue
        name = _ADAPTER.sub(r".\1", name).replace(".modules_to_save.", ".")
        name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        # Mixtral's layers in transformers 4.
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if not name.startswith("base_model."):
            name = PREFIX + name
        name = _in_model(name, modules)
        if name in names:
            raise AdapterError(f"{key!r} and {names[name]!r} are one tensor, {name!r}; keep one.")
        names[name] = key
    return {name: tensors[key] for name, key in names.items()}


def module_of(key: str, modules: Iterable[str]) -> str | None:
    """The module of this model that a tensor belongs to, by its canonical name."""
    inner = key.removeprefix(PREFIX)
    return max((m for m in modules if inner.startswith(f"{m}.")), key=len, default=None)


def _in_model(name: str, modules: set[str]) -> str:
    """The name with its module named as here, if exactly one module matches up to the model's prefix."""
    parts = name.removeprefix(PREFIX).split(".")
    if not name.startswith(PREFIX) or any(
        ".".join(parts[:n]) in modules for n in range(len(parts))
    ):
        return name
    for n in range(len(parts) - 1, 1, -1):
        own = ".".join(parts[:n])
        found = [module for module in modules if _same_module(own, module)]
        if len(found) == 1:
            return ".".join([f"{PREFIX}{found[0]}", *parts[n:]])
    return name


def _same_module(one: str, other: str) -> bool:
    """True if the names differ only by a prefix of whole models; a vision tower's layers do not match."""
    longer, shorter = sorted((one, other), key=len, reverse=True)
    if not longer.endswith(f".{shorter}"):
        return False
    return set(longer.removesuffix(f".{shorter}").split(".")) <= _PREFIXES
