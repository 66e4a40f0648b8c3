"""Weights that keep what has been trained inside a frozen field, and write it there in each step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxft.weights import is_weight


def commit(params: Any) -> Any:
    """The params after an update, with each weight that has a method `committed` replaced by its result.

    `committed()` returns the same node with what has been trained written into its frozen fields
    (PaCA keeps the trained rows inside the frozen kernel). It sees one kernel, without the axes of
    stacked layers, is called on outermost weights only, and must give the same when repeated.
    """

    def write(node):
        if not writes_back(node):
            return node
        committed = lambda n: n.committed()
        for _ in node.stack:
            committed = jax.vmap(committed)
        return committed(node)

    return jax.tree.map(write, params, is_leaf=is_weight)


def in_place(params: Any) -> Any:
    """Committed params with each weight that writes back in its form for use within a step.

    Such a weight has a static field `in_place`: it multiplies by its frozen fields alone and trusts
    that they hold what has been trained. Outside a step mark none: there a weight is right for any
    values of its fields.
    """

    def mark(node):
        if not (writes_back(node) and hasattr(node, "in_place")):
            return node
        return dataclasses.replace(node, in_place=True)

    return jax.tree.map(mark, params, is_leaf=is_weight)


def anywhere(params: Any) -> Any:
    """The params with each weight in the form that is right for any values of its fields.

    The inverse of `in_place`. `partition` calls it, so that an objective that moves what trains (noise on
    the weights, an inner gradient step) gets within a step what it gets anywhere else.
    """

    def mark(node):
        return dataclasses.replace(node, in_place=False) if is_in_place(node) else node

    return jax.tree.map(mark, params, is_leaf=is_weight)


def is_in_place(node: Any) -> bool:
    """Whether `node` is a weight in the form of `in_place`."""
    return writes_back(node) and getattr(node, "in_place", False)


def writes_back(node: Any) -> bool:
    """Whether `node` is a weight with a method `committed`."""
    # An array too has an attribute `committed`.
    return is_weight(node) and hasattr(node, "committed")
