"""The two layouts of a transformer's layers: one subtree a layer, or all stacked on axis 0."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = Any


def is_stacked(layers: Params) -> bool:
    """Whether the subtree "layers" holds stacked layers; separate ones are named "0", "1"..."""
    return "0" not in layers


def stack_layers(params: Params) -> Params:
    """The params with all layers stacked on a leading axis, for a scan over layers.

    Raises:
        ValueError: if layers differ in structure (adapters on some of them alone).
    """
    layers = params["layers"]
    if is_stacked(layers):
        return params
    ordered = [layers[str(i)] for i in range(len(layers))]
    structures = {jax.tree.structure(layer) for layer in ordered}
    if len(structures) > 1:
        raise ValueError(
            f"stack_layers: the {len(ordered)} layers have {len(structures)} different structures "
            "(adapters on some layers alone?); keep them apart with scan_layers=False."
        )
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)}


def unstack_layers(params: Params) -> Params:
    """The params with one subtree a layer, named by its number; the inverse of `stack_layers`."""
    layers = params["layers"]
    if not is_stacked(layers):
        return params
    depth = jax.tree.leaves(layers)[0].shape[0]
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i], layers)
    return {**params, "layers": {str(i): pick(i) for i in range(depth)}}
