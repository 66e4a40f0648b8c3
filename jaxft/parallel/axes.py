"""Defines what each axis of the mesh in context splits."""

from __future__ import annotations

from collections.abc import Sequence

import jax

EXPERT_AXIS = "expert"  # splits the experts of a layer, and rows elsewhere
ROW_AXES = ("data", "fsdp", EXPERT_AXIS)  # split a batch's rows
LENGTH_AXES = ("context",)  # split the tokens of a row
HEAD_AXES = ("tensor",)  # split the heads of an attention, the features of an MLP


def free_axes() -> dict[str, int]:
    """Name -> size of the axes of the mesh in context that no shard_map maps already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def dividing(size: int, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are free axes and split `size` evenly, each splitting the remainder."""
    axes, taken = free_axes(), ()
    for name in names:
        if axes.get(name, 1) > 1 and size % axes[name] == 0:
            size, taken = size // axes[name], (*taken, name)
    return taken


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in context that split this many rows; () without a mesh or in a shard_map."""
    return dividing(rows, ROW_AXES)


def length_axes(length: int) -> tuple[str, ...]:
    """The axes that split the tokens of rows of this length, like `row_axes`."""
    return dividing(length, LENGTH_AXES)


def head_axes(heads: int) -> tuple[str, ...]:
    """The axes that split this many heads, like `row_axes`."""
    return dividing(heads, HEAD_AXES)
