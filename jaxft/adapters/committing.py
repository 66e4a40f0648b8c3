"""Weights that write their trained values into a frozen field in each step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxft.weights import is_weight


def commit(params: Any) -> Any:
    """The params after an update, with each weight that has a method `committed` replaced by its result.

    `committed()` returns the same node with the trained values written into its frozen fields
    (PaCA keeps the trained rows inside the frozen kernel). It gets one kernel, without the axes of
    stacked layers, is called on outermost weights only, and must be idempotent.
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
    """Committed params in which each weight that writes back has its form for use within a step.

    Such a weight has a static field `in_place`: its products use only its frozen fields and assume
    that these hold the trained values. Do not set it outside a step: there a weight must be correct
    for any values of its fields.
    """

    def mark(node):
        if not (writes_back(node) and hasattr(node, "in_place")):
            return node
        return dataclasses.replace(node, in_place=True)

    return jax.tree.map(mark, params, is_leaf=is_weight)


def anywhere(params: Any) -> Any:
    """The params with each weight in the form that is correct for any values of its fields.

    This is the inverse of `in_place`. `partition` calls it, so that an objective that changes trainable
    leaves (noise on the weights, an inner gradient step) gives the same result within a step as outside.
    """

    def mark(node):
        return dataclasses.replace(node, in_place=False) if is_in_place(node) else node

    return jax.tree.map(mark, params, is_leaf=is_weight)


def is_in_place(node: Any) -> bool:
    """Returns whether `node` is a weight in the form of `in_place`."""
    return writes_back(node) and getattr(node, "in_place", False)


def writes_back(node: Any) -> bool:
    """Returns whether `node` is a weight with a method `committed`."""
    # Arrays also have an attribute `committed`.
    return is_weight(node) and hasattr(node, "committed")
