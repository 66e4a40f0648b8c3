"""Microbatches: a gradient estimator that adds up slices of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.keys import stream
from jaxft.metrics import Mean, Terms, WholeMean, combine_means, differentiable, is_undivided
from jaxft.optim.estimators import evaluates, evaluates_at_params
from jaxft.parallel import path_name

# A gradient estimator has the signature of jax.value_and_grad:
# estimator(fun, has_aux=True)(params, batch, key) -> ((loss, metrics), grads).
GradientEstimator = Callable[..., Any]


def accumulate(gradient: GradientEstimator, microbatches: int) -> GradientEstimator:
    """Returns `gradient` computed over slices of the batch in turn: less memory, the same result.

    With w_i = metrics["loss"].weight of slice i (1 if that is not a Mean),

        loss = Σ w_i loss_i / Σ w_i,    grads = Σ w_i grads_i / Σ w_i,

    with sums in float32, so the token mean over the slices equals the token mean over the batch
    for any slice lengths. If metrics["loss"] is `Terms`, the loss of the whole batch is
    Σ_k (Σ_i total_ki) / W_k with W_k = Σ_i weight_ki. The weights do not depend on the params: a first
    pass over the slices adds them up (the compiler reduces it to the masks), and then

        loss = Σ_i Σ_k total_ki / W_k,    its gradient slice by slice.

    The first pass also adds up each `WholeMean`, at the cost of computing it (KTO: a forward pass
    without gradient, which the second pass then skips; BCO: one more forward pass). The slices find it
    in batch["whole"]. An objective that logs an `Undivided` value is refused.

    Means add up. Other metrics are averaged with the weights w_i or, if the loss is Terms, over the
    slices of nonzero weight. A slice of weight 0 contributes nothing, even if it holds NaN; if all
    slices have weight 0, loss and gradients are 0.

    Each leaf of the batch is split on axis 0; row r goes to slice r mod `microbatches`, so that
    rows split over devices stay where they are. Leaves without axes go to every slice. Each slice
    draws from its own key.

    An estimator that must see the whole batch goes outside: sam(accumulate(jax.value_and_grad, 4)).

    Raises:
        ValueError: if microbatches is below 1 or does not divide the batch, if the objective needs the
            whole batch, or for Terms without their gradient.
    """
    if microbatches < 1:
        raise ValueError(f"accumulate: microbatches must be at least 1, got {microbatches}.")
    if microbatches == 1:
        return gradient

    def estimator(fun, has_aux=True):
        if not has_aux:
            raise ValueError("accumulate: needs has_aux=True: the weights come from the metrics.")

        def value_and_grad(params, batch, key):
            slices = split_batch(batch, microbatches), _own_keys(key, microbatches)
            whole, weights = _first_pass(lambda part: fun(params, *part)[1], slices)
            estimate = gradient(_on_slices(fun, whole, weights), has_aux=True)
            plain = []  # names of metrics that are not Means, seen while tracing

            def weighted(part):
                (loss, metrics), grads = estimate(params, *part)
                plain[:] = [k for k, m in metrics.items() if not isinstance(m, Mean | Terms)]
                weight = loss_weight(metrics)
                scale = lambda x: _weighted(x, weight)
                # Values of the first pass are left out, so that they are not computed again.
                metrics = {k: m for k, m in as_means(metrics).items() if k not in whole}
                return weight, scale(loss), metrics, jax.tree.map(scale, grads)

            weighted = jax.jit(weighted, inline=True)  # traced once, for its shapes and in the scan
            shapes = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], slices))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            add = lambda total, part: (jax.tree.map(jnp.add, total, weighted(part)), None)
            (weight, loss, metrics, grads), _ = jax.lax.scan(add, zeros, slices)
            # Slices of Terms are parts of a sum, already divided by the weights of the whole batch.
            mean = lambda total: total if weights else Mean(total, weight).value
            metrics = {k: m.value if k in plain else m for k, m in metrics.items()}
            grads = jax.tree.map(lambda g, p: mean(g).astype(p.dtype), grads, params)
            return (mean(loss), metrics | whole), grads

        return value_and_grad

    at_params = evaluates_at_params(gradient)
    return estimator if at_params is None else evaluates(at_params=at_params)(estimator)


def _first_pass(metrics_of, slices):
    """Returns ({name: WholeMean}, weights of the loss's Terms) of the whole batch; either may be empty."""

    def found(part):
        metrics = metrics_of(part)
        _refuse_undivided(metrics)
        whole = {k: m for k, m in as_means(metrics).items() if isinstance(m, WholeMean)}
        loss = metrics.get("loss")
        weights = [part.weight * 1.0 for part in loss.parts] if isinstance(loss, Terms) else []
        return jax.lax.stop_gradient((whole, weights))

    found = jax.jit(found, inline=True)  # traced once, for its shapes and in the map
    shapes = jax.eval_shape(found, jax.tree.map(lambda x: x[0], slices))
    return combine_means(jax.lax.map(found, slices)) if jax.tree.leaves(shapes) else shapes


def _on_slices(fun, whole, weights):
    """Returns the objective of a slice, given the means and weights of the whole batch."""
    if not whole and not weights:
        return fun

    def objective(params, batch, key):
        loss, metrics = fun(params, batch | {"whole": whole} if whole else batch, key)
        if weights:
            terms = differentiable(as_means(metrics)["loss"], loss)
            parts = zip(terms.parts, weights, strict=True)
            loss = sum(Mean(part.total, weight).value for part, weight in parts)
        return loss, metrics

    return objective


def _refuse_undivided(metrics):
    found = [name for name, metric in metrics.items() if is_undivided(metric)]
    # Name the undivided part, not the Terms that contain it.
    if found:
        name = min(found, key=lambda name: isinstance(metrics[name], Terms))
        raise ValueError(
            f"microbatches: {name!r} is a value of the whole batch and not a sum over its rows, as with "
            "sample_distance or aot_loss; use microbatches=1 with a smaller batch, or a distance or loss "
            "that is a Mean. (A custom pair loss that could not be tested is assumed to be such a value: "
            "see losses.compares_pairs.)"
        )


def in_slices(
    fun: Callable[[Any, jax.Array], Mean | Terms], batch: Any, key: jax.Array, microbatches: int
) -> Mean | Terms:
    """Computes fun(batch, key) slice by slice; a slice of weight 0 counts as 0."""
    if microbatches == 1:
        return fun(batch, key)
    slices = split_batch(batch, microbatches), _own_keys(key, microbatches)
    # The backward pass recomputes each slice instead of storing it.
    part = jax.checkpoint(lambda part: as_means({"loss": fun(*part)})["loss"])
    return combine_means(jax.lax.map(part, slices))


def split_batch(batch: Any, parts: int) -> Any:
    """Reshapes leaves [B, ...] to [parts, B / parts, ...]: row r is in part r mod `parts`."""

    def split(path, leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0:
            return jnp.broadcast_to(leaf, (parts,))
        rows = leaf.shape[0]
        if rows % parts:
            name = path_name(path)
            raise ValueError(
                f"microbatches: {rows} rows of {name!r} {leaf.shape} cannot be split into {parts} "
                "equal parts; choose a number of microbatches that divides the batch."
            )
        return jnp.moveaxis(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree_util.tree_map_with_path(split, batch)


def joined(parts: Any) -> Any:
    """The inverse of `split_batch` for leaves with rows: [parts, B / parts, ...] as [B, ...]."""
    rows = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) if x.ndim > 1 else x
    return jax.tree.map(rows, parts)


def _own_keys(key, parts):
    return jax.vmap(functools.partial(stream, key, "microbatch"))(jnp.arange(parts))


def loss_weight(metrics: dict[str, Any]) -> jax.Array:
    """Weight of a slice of the loss: the weight of metrics["loss"], or 1 if that is not a Mean.

    Terms have their own weights: 1 if any of them is nonzero, else 0.
    """
    loss = metrics.get("loss")
    if isinstance(loss, Terms):
        return functools.reduce(jnp.maximum, [1.0 * (part.weight > 0) for part in loss.parts])
    return jnp.asarray(loss.weight if isinstance(loss, Mean) else 1.0, jnp.float32)


def as_means(metrics: dict[str, Any]) -> dict[str, Mean | Terms]:
    """Converts metrics to Means and Terms, which add up; a plain number is weighted like the loss.

    A weight of 0 makes the total 0, even if the total is NaN.
    """
    weight = loss_weight(metrics)

    def as_mean(metric):
        if isinstance(metric, Terms):
            return Terms(tuple(map(as_mean, metric.parts)))
        if not isinstance(metric, Mean):
            return Mean(_weighted(jnp.asarray(metric), weight), weight)
        total = jnp.where(metric.weight == 0, 0.0, metric.total)
        return metric._replace(total=total, weight=metric.weight * 1.0)

    return {name: as_mean(metric) for name, metric in metrics.items()}


def _weighted(x, weight):
    # jnp.where rather than only a product: 0 * NaN is NaN.
    return jnp.where(weight == 0, 0.0, x.astype(jnp.float32) * weight)
