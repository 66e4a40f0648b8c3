"""The two forms of a transformer's layers: one subtree per layer, or all stacked on axis 0.

`layers` is the path of the layers' subtree in a family's params, "layers" by default.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.parallel import LAYERS

Params = Any


def layers_in(params: Params, layers: str = LAYERS) -> Params | None:
    """The subtree of the layers, or None without one."""
    for name in layers.split("/"):
        if name not in params:
            return None
        params = params[name]
    return params


def is_stacked(params: Params, layers: str = LAYERS) -> bool:
    """Returns whether the params hold stacked layers; separate ones are named "0", "1"..."""
    blocks = layers_in(params, layers)
    return blocks is not None and "0" not in blocks


def depth(params: Params, layers: str = LAYERS) -> int:
    """The number of layers."""
    blocks = layers_in(params, layers)
    return jax.tree.leaves(blocks)[0].shape[0] if is_stacked(params, layers) else len(blocks)


def stack_layers(params: Params, layers: str = LAYERS) -> Params:
    """The params with all layers stacked on a leading axis, for a scan over layers.

    Raises:
        ValueError: if there are no layers, or they differ in structure or shapes (adapters on only some
            layers, layers of several kinds).
    """
    if is_stacked(params, layers):
        return params
    blocks = layers_in(params, layers)
    if blocks is None:
        raise ValueError(f"stack_layers: no layers at {layers!r}; params hold {', '.join(params)}.")
    ordered = [blocks[str(i)] for i in range(len(blocks))]
    structures = {jax.tree.structure(layer) for layer in ordered}
    if len(structures) > 1:
        raise ValueError(
            f"stack_layers: the {len(ordered)} layers have {len(structures)} different structures "
            "(adapters on only some layers, or layers of several kinds); keep them separate with "
            "scan_layers=False."
        )
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(layer)) for layer in ordered}
    if len(shapes) > 1:
        raise ValueError(
            f"stack_layers: the leaves of the {len(ordered)} layers have {len(shapes)} different shapes "
            "(layers of several kinds?); keep them separate with scan_layers=False."
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return _with_layers(params, layers, stacked)


def unstack_layers(params: Params, layers: str = LAYERS) -> Params:
    """The params with one subtree per layer, named by its number; the inverse of `stack_layers`."""
    if not is_stacked(params, layers):
        return params
    blocks = layers_in(params, layers)
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i], blocks)
    apart = {str(i): pick(i) for i in range(depth(params, layers))}
    return _with_layers(params, layers, apart)


def _with_layers(params, layers, blocks):
    name, _, rest = layers.partition("/")
    return {**params, name: _with_layers(params[name], rest, blocks) if rest else blocks}
