"""Microbatches: a gradient estimator that adds up slices of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.keys import stream
from jaxft.metrics import Mean, combine_means

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
            slices = split_batch(batch, microbatches), _own_keys(key, microbatches)
            plain = []  # names of metrics that are no Means, seen while tracing

            def weighted(part):
                (loss, metrics), grads = estimate(params, *part)
                plain[:] = [k for k, m in metrics.items() if not isinstance(m, Mean)]
                weight = loss_weight(metrics)
                scale = lambda x: _weighted(x, weight)
                return weight, scale(loss), as_means(metrics), jax.tree.map(scale, grads)

            shapes = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], slices))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            add = lambda total, part: (jax.tree.map(jnp.add, total, weighted(part)), None)
            (weight, loss, metrics, grads), _ = jax.lax.scan(add, zeros, slices)
            mean = lambda total: Mean(total, weight).value
            metrics = {k: m.value if k in plain else m for k, m in metrics.items()}
            grads = jax.tree.map(lambda g, p: mean(g).astype(p.dtype), grads, params)
            return (mean(loss), metrics), grads

        return value_and_grad

    return estimator


def in_slices(
    fun: Callable[[Any, jax.Array], Mean], batch: Any, key: jax.Array, microbatches: int
) -> Mean:
    """fun(batch, key), one slice of the batch after the other; a slice of weight 0 counts as 0."""
    if microbatches == 1:
        return fun(batch, key)
    slices = split_batch(batch, microbatches), _own_keys(key, microbatches)
    # Where a gradient flows through it, a slice is recomputed rather than stored.
    part = jax.checkpoint(lambda part: as_means({"loss": fun(*part)})["loss"])
    return combine_means(jax.lax.map(part, slices))


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


def _own_keys(key, parts):
    return jax.vmap(functools.partial(stream, key, "microbatch"))(jnp.arange(parts))


def loss_weight(metrics: dict[str, Any]) -> jax.Array:
    """What the loss is a mean over: the weight of metrics["loss"], or 1 if that is no Mean."""
    loss = metrics.get("loss")
    return jnp.asarray(loss.weight if isinstance(loss, Mean) else 1.0, jnp.float32)


def as_means(metrics: dict[str, Any]) -> dict[str, Mean]:
    """The metrics as Means that add up: what is no Mean is weighted like the loss.

    A weight of 0 makes its total 0, even where that is NaN.
    """
    weight = loss_weight(metrics)

    def as_mean(metric):
        if not isinstance(metric, Mean):
            return Mean(_weighted(jnp.asarray(metric), weight), weight)
        return Mean(jnp.where(metric.weight == 0, 0.0, metric.total), metric.weight * 1.0)

    return {name: as_mean(metric) for name, metric in metrics.items()}


def _weighted(x, weight):
    # where, not only a product: 0 * NaN is NaN.
    return jnp.where(weight == 0, 0.0, x.astype(jnp.float32) * weight)
