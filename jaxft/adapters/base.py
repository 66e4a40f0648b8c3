"""The model under an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxft.adapters.committing import writes_back
from jaxft.adapters.rewrite import Params, map_children
from jaxft.weights import Frozen, ReshapedWeight, Weight, is_weight

_ADDED = ("prompt", "prefix", "adapter")


def base_params(params: Params) -> Params:
    """The params without their adapters, all frozen; nothing is copied, each kernel is the adapter's base.

    The result serves as the reference model during training. Do not use it for PiSSA, whose base is the
    kernel without its leading part; the params cannot distinguish PiSSA from LoRA. Under jit the two models
    share computation where possible.

    Raises:
        ValueError: if the initial values are not kept: for kernels, biases and norms that train
            themselves, and for PaCA, which writes into its base. For those, compute the log-probs
            before training.
    """
    return _visit("", params)


def _visit(path: str, node: Any) -> Any:
    if isinstance(node, Frozen):
        return node
    if isinstance(node, ReshapedWeight):
        return dataclasses.replace(node, matrix=_visit(path, node.matrix))
    base = getattr(node, "base", None)
    if isinstance(node, Weight) and base is not None and not writes_back(node):
        return base if isinstance(base, Frozen) else Frozen(base)
    if not (is_weight(node) or jax.tree_util.all_leaves([node])):
        if isinstance(node, Mapping) and not node.keys().isdisjoint(_ADDED):
            node = {name: child for name, child in node.items() if name not in _ADDED}
        return map_children(lambda name, child: _visit(f"{path}/{name}".lstrip("/"), child), node)
    raise ValueError(
        f"base_params: {path} is trained in place, so its initial value is lost; compute the reference's "
        "log-probs before training, as jaxft.train.reference_log_probs does."
    )
