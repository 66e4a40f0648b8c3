"""Microbatches: a gradient estimator that adds up slices of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.metrics import Mean

# A gradient estimator has the signature of jax.value_and_grad:
# estimator(fun, has_aux=True)(params, batch, key) -> ((loss, metrics), grads).
GradientEstimator = Callable[..., Any]


def accumulate(gradient: GradientEstimator, microbatches: int) -> GradientEstimator:
    """`gradient` over slices of the batch, one after the other: less memory, the same result.

    With w_i = metrics["loss"].weight of slice i (1 if that is no Mean),

        loss = Σ w_i loss_i / Σ w_i,    grads = Σ w_i grads_i / Σ w_i,

    sums in float32, so a token-mean over the slices is the token-mean over the batch whatever
    the slices' lengths. Means add up, other metrics are averaged with the w_i. A slice of weight 0
    contributes nothing, even when it holds NaN; if all are, loss and gradients are 0.

    Each leaf of the batch is split on axis 0; row r goes to slice r mod `microbatches`, so that
    rows split over devices stay where they are. Leaves without axes go to every slice. Each slice
    draws from its own key.

    An estimator that must see the whole batch goes outside: sam(accumulate(jax.value_and_grad, 4)).
    """
    if microbatches < 1:
        raise ValueError(f"accumulate: microbatches must be at least 1, got {microbatches}.")
    if microbatches == 1:
        return gradient

    def estimator(fun, has_aux=True):
        if not has_aux:
            raise ValueError("accumulate: needs has_aux=True: the weights come from the metrics.")
        estimate = gradient(fun, has_aux=True)

        def value_and_grad(params, batch, key):
            slices = split_batch(batch, microbatches), jax.random.split(key, microbatches)
            weighted = lambda part: _weigh(*estimate(params, *part))
            shapes = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], slices))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            add = lambda total, part: (jax.tree.map(jnp.add, total, weighted(part)), None)
            total, _ = jax.lax.scan(add, zeros, slices)
            return _unweigh(total, params)

        return value_and_grad

    return estimator


def split_batch(batch: Any, parts: int) -> Any:
    """The batch with leaves [B, ...] as [parts, B / parts, ...]: row r is in part r mod `parts`."""

    def split(path, leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0:
            return jnp.broadcast_to(leaf, (parts,))
        rows = leaf.shape[0]
        if rows % parts:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"microbatches: {rows} rows of {name!r} {leaf.shape} cannot be split into {parts} "
                "equal parts; choose a number of microbatches that divides the batch."
            )
        return jnp.moveaxis(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree_util.tree_map_with_path(split, batch)


def loss_weight(metrics: dict[str, Any]) -> jax.Array:
    """What the loss is a mean over: the weight of metrics["loss"], or 1 if that is no Mean."""
    loss = metrics.get("loss")
    return jnp.asarray(loss.weight if isinstance(loss, Mean) else 1.0, jnp.float32)


def _is_mean(node):
    return isinstance(node, Mean)


def _weigh(value, grads):
    loss, metrics = value
    weight = loss_weight(metrics)
    # where, not a product: 0 * NaN is NaN.
    scale = lambda x: jnp.where(weight == 0, 0.0, x * weight)
    add = lambda m: Mean(jnp.where(m.weight == 0, 0.0, m.total), m.weight * 1.0)
    metrics = {k: add(m) if _is_mean(m) else jax.tree.map(scale, m) for k, m in metrics.items()}
    grads = jax.tree.map(lambda g: scale(g.astype(jnp.float32)), grads)
    return weight, scale(loss), metrics, grads


def _unweigh(total, params):
    weight, loss, metrics, grads = total
    mean = lambda x: jnp.where(weight == 0, 0.0, x / jnp.where(weight == 0, 1.0, weight))
    metrics = {k: m if _is_mean(m) else jax.tree.map(mean, m) for k, m in metrics.items()}
    grads = jax.tree.map(lambda g, p: mean(g).astype(p.dtype), grads, params)
    return (mean(loss), metrics), grads
