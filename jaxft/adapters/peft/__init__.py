"""Adapters in the format of Hugging Face PEFT, in and out: one module for each kind of adapter.

A kind is two pure functions: read(settings, tensors, model) -> {path: weight}, which removes the tensors
that it reads from `tensors`, and write(model, {path: weight}) -> (settings, tensors).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import native
from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft import (
    adalora,
    ia3,
    lora,
    low_rank,
    lycoris,
    orthogonal,
    paca,
    randlora,
    tokens,
    vera,
    whole,
)
from jaxft.adapters.peft.base_tensors import (
    VOCABULARY,
    check_vocabulary,
    read_base,
    take_tied,
    untied,
)
from jaxft.adapters.peft.files import Settings, Tensors, read_files, take, write_files
from jaxft.adapters.peft.keys import canonical, module_of
from jaxft.adapters.peft.model import PREFIX, Model, model_of, numpy, targeted
from jaxft.adapters.peft.options import with_defaults
from jaxft.adapters.peft.soft import TYPES as SOFT
from jaxft.adapters.peft.soft import read_soft, soft_name, write_soft
from jaxft.adapters.rewrite import Params, partition, path_name
from jaxft.models import FAMILIES, Family, family_of, is_stacked, stack_layers, unstack_layers
from jaxft.models.transformer import EMBEDDING
from jaxft.parallel import to_host
from jaxft.weights import (
    BoftWeight,
    DoraWeight,
    Frozen,
    LohaWeight,
    LokrWeight,
    LoraWeight,
    OftWeight,
    PacaWeight,
    RandloraWeight,
    ScaledWeight,
    VeraWeight,
    WeightLike,
    is_weight,
    pissa_to_lora,
    to_dense,
)


class Format(NamedTuple):
    """One peft_type: its weights and its two functions."""

    weights: tuple[type, ...]
    read: Callable[[Settings, Tensors, Model], dict[str, WeightLike]]
    write: Callable[[Model, dict[str, Any]], tuple[Settings, Tensors]] | None


# The options that say which modules are adapted.
_NAMING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SCORE = f"{PREFIX}score.weight"

# Keyed by the file's peft_type.
FORMATS = {
    "LORA": Format((LoraWeight, DoraWeight), lora.read, lora.write),
    "LOHA": Format((LohaWeight,), lycoris.read_loha, lycoris.write_loha),
    "LOKR": Format((LokrWeight,), lycoris.read_lokr, lycoris.write_lokr),
    "VERA": Format((VeraWeight,), vera.read, vera.write),
    "OFT": Format((OftWeight,), orthogonal.read_oft, orthogonal.write_oft),
    "BOFT": Format((BoftWeight,), orthogonal.read_boft, orthogonal.write_boft),
    "RANDLORA": Format((RandloraWeight,), randlora.read, randlora.write),
    "IA3": Format((ScaledWeight,), ia3.read, ia3.write),
    "PACA": Format((PacaWeight,), paca.read, paca.write),
    "LN_TUNING": Format((), whole.read_norms, whole.write_norms),
    "TRAINABLE_TOKENS": Format((), tokens.read, tokens.write),
    # These are read as LoRA and saved as LoRA.
    "ADALORA": Format((), adalora.read, None),
    "VBLORA": Format((), low_rank.read_vblora, None),
    "HRA": Format((), low_rank.read_hra, None),
}


def save_adapter(
    path: str | os.PathLike,
    config: Any,
    params: Params,
    *,
    base_model: str = "",
    base: Params | None = None,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes the trainable leaves of adapted params in PEFT's format; the weights determine the peft_type.

    GPT-2 keeps query, key and value in one matrix: LoRA on them is written as one LoRA of the summed
    rank, with a block-diagonal B. A reward head (`reward/kernel`) is saved whole as `score` of a
    sequence classifier with one label.

    Args:
        path: the directory; made if needed.
        config: of the model.
        params: adapted, of either layout, over dense or quantised kernels.
        base_model: written as base_model_name_or_path.
        base: the params before they were adapted. LoRA over a different kernel is PiSSA, and
            is written as the difference from `base`, of twice the rank; without `base`, PiSSA is saved
            as LoRA, and the file fits only the residual kernels.
        families: the records of the known families, for the names of the torch model.

    Raises:
        AdapterError: if nothing trains, or a leaf trains that PEFT's format cannot hold (see save_native).
    """
    settings, tensors = adapter_tensors(config, params, base, families=families)
    codec = family_of(config, families).huggingface
    task_type = None if codec.untyped else codec.task_type
    common = {
        "task_type": "SEQ_CLS" if "reward" in params else task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    write_files(pathlib.Path(path), common | settings, tensors)


def adapter_tensors(
    config: Any,
    params: Params,
    base: Params | None = None,
    *,
    families: Sequence[Family] = FAMILIES,
) -> tuple[Settings, Tensors]:
    """(settings, tensors) that `save_adapter` writes; see there for arguments and errors."""
    head = params.get("reward")
    params = {name: node for name, node in params.items() if name != "reward"}
    if head is not None and set(head) != {"kernel"}:
        raise AdapterError(
            "save_adapter: the head of a cross-encoder; use save_native, or save_model for the whole model."
        )
    if (name := soft_name(params)) is not None:
        if head is not None:
            raise AdapterError(f"save_adapter: a {name} beside a reward head; use save_native.")
        return write_soft(config, params, name)
    family = family_of(config, families)
    apart = lambda tree: unstack_layers(tree, family.layers)
    model = model_of(family, config, apart(params))
    trained = {p: node for p, node in model.nodes.items() if jax.tree.leaves(partition(node)[0])}
    leaves = {path: node for path, node in trained.items() if not is_weight(node)}
    adapted = {path: node for path, node in trained.items() if is_weight(node)}
    if not trained:
        raise AdapterError("save_adapter: nothing trains in params; adapt them first.")
    if not adapted and not whole.only_norms(model, leaves):
        raise AdapterError(
            f"save_adapter: {min(leaves)!r} trains and is not a norm; PEFT has no type for that. Use "
            "save_native, or save the whole model with save_model."
        )
    kind = _kind(adapted)
    _check_places(kind, adapted, model)
    original = None
    if base is not None:
        original = model_of(family, config, apart(base)).nodes
        adapted = {path: _on(original[path], node, path) for path, node in adapted.items()}
    settings, tensors = FORMATS[kind].write(model, adapted or leaves)
    if adapted:
        more, beside = whole.write_whole(model, leaves, adapted, biases=kind == "LORA")
        settings, tensors = settings | more, tensors | beside
        tensors |= _own_vocabulary(model, adapted, original)
    if head is not None:
        tensors[SCORE] = numpy(to_dense(head["kernel"])).T
        settings["modules_to_save"] = [*(settings.get("modules_to_save") or []), "score"]
    return {"peft_type": kind} | settings, tensors


def load_adapter(
    path: str | os.PathLike,
    config: Any,
    params: Params,
    *,
    families: Sequence[Family] = FAMILIES,
) -> Params:
    """The params with the adapter of a PEFT directory; all other leaves are frozen.

    The kernels may be quantised. A directory of `save_native` is read too. `score` of a sequence
    classifier with one label becomes `reward/kernel`.

    Raises:
        AdapterError: if a file is missing or damaged, a key is missing, surplus or misshapen, or
            jaxft does not support the adapter's type or one of its options.
    """
    path, family = pathlib.Path(path), family_of(config, families)
    if (path / native.CONFIG).exists():
        return native.load_native(
            path,
            params,
            targets=family.targets,
            layers=family.layers,
            stacked=family.stacked_axes,
        )
    stacked = is_stacked(params, family.layers)
    bare = lambda node: node.value if isinstance(node, Frozen) else node
    flat = jax.tree.map(bare, unstack_layers(params, family.layers), is_leaf=is_weight)
    try:
        settings, tensors = read_files(path)
        settings = with_defaults(settings)
        if settings["peft_type"] in SOFT:
            adapted = read_soft(settings, tensors, config, params)
            if tensors:
                raise AdapterError(
                    f"surplus key {min(tensors)!r}; a {settings['peft_type']} has one."
                )
            return adapted
        model = model_of(family, config, flat)
        tensors = canonical(tensors, model)
        head = _head(tensors, config)
        found = _read(settings, tensors, model)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    attach = lambda p, node: found.get(path_name(p), Frozen(node))
    adapted = jax.tree_util.tree_map_with_path(attach, flat, is_leaf=is_weight)
    adapted |= head
    return stack_layers(adapted, family.layers) if stacked else adapted


def _head(tensors: Tensors, config: Any) -> Params:
    """The reward head of a file, or an empty dict."""
    if SCORE not in tensors:
        return {}
    return {"reward": {"kernel": jnp.asarray(take(tensors, SCORE, (1, config.hidden_size)).T)}}


def _read(settings: Settings, tensors: Tensors, model: Model) -> dict[str, WeightLike]:
    check_vocabulary(tensors, model)
    found = FORMATS[settings["peft_type"]].read(settings, tensors, model)
    found |= whole.read_whole(settings, tensors, model, found)
    for path, leaf in read_base(tensors, model).items():
        node = found.get(path, leaf)
        found[path] = dataclasses.replace(node, base=leaf) if is_weight(node) else leaf
    if model.tied:
        embedding = found.get(EMBEDDING, model.nodes[EMBEDDING])
        embedding = embedding.base if is_weight(embedding) else embedding
        take_tied(tensors, model, to_host(to_dense(embedding)))
    if tensors:
        raise AdapterError(_surplus(min(tensors), settings, model))
    if not found:
        raise AdapterError("target_modules names no module of this model.")
    return found


def _surplus(key: str, settings: Settings, model: Model) -> str:
    """The message for a tensor that was not read."""
    groups = {group.module for group in model.grouped}
    module = module_of(key, [*model.leaves, *groups, model.head])
    if module is None and key.startswith(f"{PREFIX}classifier."):
        return (
            f"surplus key {key!r}: the head of an encoder's classifier is not read from adapters; merge the "
            "adapter in PEFT (merge_and_unload, save_pretrained) and load that model."
        )
    if module is None:
        return (
            f"surplus key {key!r}; the adapter is for another model: this one has no such module."
        )
    if re.search(r"\.(lora|hada|lokr|vblora|hra|vera|oft|boft|randlora|ia3|paca|ln_tuning)_", key):
        if model.tied and module == model.head:
            return untied(model, f"{settings['peft_type']} is only on {module}")
        if module not in targeted(settings, {}, model, model.leaves):
            named = {n: settings[n] for n in _NAMING if settings.get(n)} or "no module"
            return f"surplus key {key!r}; adapter_config.json does not name its module: {named}."
    return (
        f"surplus key {key!r}; {settings['peft_type']} with the options of adapter_config.json has no such "
        f"tensor (modules_to_save={settings.get('modules_to_save')}); the two files do not belong together."
    )


def _own_vocabulary(model: Model, adapted: dict, original: Any) -> Tensors:
    """The embeddings and output projection under LoRA, which PEFT saves unless they are the base's."""
    tensors = {}
    for linear in (*model.linears, *model.embeddings):
        path, node = linear.paths[0], adapted.get(linear.paths[0])
        if path not in VOCABULARY or not isinstance(node, LoraWeight):
            continue
        kernel = numpy(to_dense(node.base))
        if original is not None and np.array_equal(kernel, numpy(to_dense(original[path]))):
            continue
        tensors[linear.key("base_layer.weight")] = kernel if linear.embedding else kernel.T
        if linear.embedding and model.tied:
            tensors[f"{PREFIX}{model.head}.base_layer.weight"] = kernel
    return tensors


def _check_places(kind: str, adapted: dict, model: Model) -> None:
    known = {path for linear in model.linears for path in linear.paths}
    if kind == "LORA":
        known |= {group.path for group in model.grouped}
    if kind in ("LORA", "TRAINABLE_TOKENS"):
        known |= {path for linear in model.embeddings for path in linear.paths}
    for path in sorted(adapted.keys() - known):
        name = type(adapted[path]).__name__
        raise AdapterError(
            f"save_adapter: {path!r} trains as {name}, which PEFT does not have there. Use save_native."
        )


def _kind(adapted) -> str:
    kinds = {}
    for path, node in adapted.items():
        if isinstance(node, LoraWeight) and node.rounded_rest:
            raise AdapterError(
                f"save_adapter: {path!r} is PiSSA over a quantised residual (QPiSSA), of which PEFT's files "
                "keep only A and B. Use save_native."
            )
        kind = next((k for k, f in FORMATS.items() if isinstance(node, f.weights)), None)
        if kind == "PACA" and path.endswith("/embedding"):
            kind = "TRAINABLE_TOKENS"
        if kind is None:
            raise AdapterError(
                f"save_adapter: {path!r} trains as {type(node).__name__}, which PEFT does not have. Use "
                "save_native."
            )
        kinds[kind] = path
    if kinds.keys() == {"LORA", "TRAINABLE_TOKENS"}:
        return "LORA"
    if len(kinds) > 1:
        places = ", ".join(f"{kind} at {path!r}" for kind, path in kinds.items())
        raise AdapterError(f"save_adapter: a PEFT file holds one type, params have {places}.")
    return next(iter(kinds), "LN_TUNING")


def _on(kernel, node, path):
    """The weight with `kernel` as its base: PiSSA's own base is the residual."""
    kernel = kernel.value if isinstance(kernel, Frozen) else kernel
    same = lambda base: is_weight(base) or is_weight(kernel) or bool(jnp.array_equal(base, kernel))
    # PaCA's base may hold its rows.
    if not hasattr(node, "base") or isinstance(node, PacaWeight) or same(node.base):
        return node
    if not isinstance(node, LoraWeight):
        raise AdapterError(
            f"save_adapter: {path!r} trains as {type(node).__name__} over another kernel than that of `base` "
            "(DoRA after init_lora_weights pissa or olora does), which PEFT's files cannot name. Merge it "
            "and save the whole model, or convert it with as_lora."
        )
    moved = pissa_to_lora(node, kernel)
    lost = jnp.max(jnp.abs(moved.to_dense() - node.to_dense()))
    if lost > jnp.finfo(kernel.dtype).eps ** 0.5 * jnp.max(jnp.abs(kernel)):
        if path in VOCABULARY:  # Its base is written too.
            return node
        raise AdapterError(
            f"save_adapter: the kernel under {path!r} is neither that of `base` nor PiSSA's residual "
            "of it; give the params that were adapted."
        )
    return moved
