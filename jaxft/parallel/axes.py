"""Which axes of the mesh in context split what: the one place that says what a mesh axis is for."""

from __future__ import annotations

from collections.abc import Sequence

import jax

ROW_AXES = ("data", "fsdp")  # a batch's rows lie over these
LENGTH_AXES = ("context",)  # and the tokens of a row over these
HEAD_AXES = ("tensor",)  # and the heads of an attention, the features of an MLP


def free_axes() -> dict[str, int]:
    """Name -> size of the axes of the mesh in context that no shard_map maps already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def dividing(size: int, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are free axes and split `size` evenly, each what those before it left."""
    axes, taken = free_axes(), ()
    for name in names:
        if axes.get(name, 1) > 1 and size % axes[name] == 0:
            size, taken = size // axes[name], (*taken, name)
    return taken


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in context over which so many rows are split; () without, or in a shard_map."""
    return dividing(rows, ROW_AXES)


def length_axes(length: int) -> tuple[str, ...]:
    """The axes over which the tokens of rows so long are split, likewise."""
    return dividing(length, LENGTH_AXES)


def head_axes(heads: int) -> tuple[str, ...]:
    """The axes over which so many heads are split, likewise."""
    return dividing(heads, HEAD_AXES)
