"""Means that keep their weight, so that parts of a batch add up to the whole."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


class Mean(NamedTuple):
    """total / weight, stored separately: the mean of two parts is the sum of totals over that of weights."""

    total: jax.Array  # [], sum of weight_i * value_i
    weight: jax.Array  # [], sum of weight_i: tokens, sequences, ...

    @property
    def value(self) -> jax.Array:
        """total / weight, and 0 where the weight is 0."""
        # The inner where keeps the division's gradient finite when nothing was counted.
        weight = jnp.asarray(self.weight, jnp.float32)
        return jnp.where(weight == 0, 0.0, self.total / jnp.where(weight == 0, 1.0, weight))

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> "Mean":
        """The mean of `values` weighted by `weights`, two arrays of one shape, summed in float32."""
        if values.shape != weights.shape:
            raise ValueError(
                f"Mean.of: values {values.shape} and weights {weights.shape} differ in shape; "
                "broadcast one to the other first."
            )
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights))


class WholeMean(Mean):
    """A Mean, without gradient, that its own objective uses: KTO's KL, BCO's mean reward.

    The mean of a part of a batch differs from that of the whole. An objective therefore takes
    `metrics[name].over(batch, name)`: the entry `name` of `batch["whole"]` if it is there, else its
    own. Microbatches first add it up over all slices and then give each slice the sum
    (jaxft.train.accumulate).
    """

    __slots__ = ()

    def over(self, batch: dict[str, Any], name: str) -> Mean:
        """The mean over the whole of a batch that may be a part of it."""
        return jax.lax.stop_gradient(batch.get("whole", {}).get(name, self))


class Undivided(Mean):
    """A value of a whole batch that is not a sum over its rows: its batch cannot be cut into slices."""

    __slots__ = ()


def is_undivided(metric: Any) -> bool:
    """True for `Undivided`, and for `Terms` with an `Undivided` part."""
    parts = metric.parts if isinstance(metric, Terms) else (metric,)
    return any(isinstance(part, Undivided) for part in parts)


class Terms(NamedTuple):
    """Σ_k total_k / weight_k: a loss of several means, each over its own tokens, records or samples.

    Parts of a batch add up term by term. One total over one weight would not: if slices differ in
    the ratio of two weights, their terms would have other weights than in the whole batch.

    An objective returns it as metrics["loss"], *with* its gradient, and `value` as its loss:

        terms = Terms((task, Mean(kl_weight * kl.total, kl.weight)))
        return terms.value, jax.lax.stop_gradient(metrics) | {"loss": terms}

    Without its gradient it is refused when parts of a batch are added up (`differentiable`).
    """

    parts: tuple[Mean, ...]  # the task's first; coefficients are in the totals

    @property
    def value(self) -> jax.Array:
        """Σ_k total_k / weight_k; a term of weight 0 counts 0."""
        return sum(part.value for part in self.parts)

    @property
    def weight(self) -> jax.Array:
        """The weight of the first term, the task's."""
        return self.parts[0].weight


def differentiable(terms: Terms, loss: jax.Array) -> Terms:
    """The terms of a loss, for taking its gradient through them.

    Raises:
        ValueError: when differentiated, if `loss` has a gradient and the totals of its terms have none, as
            after jax.lax.stop_gradient(metrics): the gradient would silently be 0.
    """
    totals = _with_gradient([part.total for part in terms.parts], loss)
    return Terms(tuple(p._replace(total=t) for p, t in zip(terms.parts, totals, strict=True)))


@jax.custom_jvp
def _with_gradient(totals, loss):
    del loss
    return totals


@functools.partial(_with_gradient.defjvp, symbolic_zeros=True)
def _with_gradient_jvp(primals, tangents):
    has = lambda tangent: not isinstance(tangent, SymbolicZero)
    if has(tangents[1]) and not any(map(has, tangents[0])):
        raise ValueError(
            'metrics["loss"] is Terms without a gradient, but microbatches, and objectives around this one, '
            "take the gradient through them. Take stop_gradient of only the other metrics: "
            'jax.lax.stop_gradient(metrics) | {"loss": terms}.'
        )
    return primals[0], tangents[0]


def terms_of(loss: jax.Array, logged: Any, coefficient: float = 1.0) -> tuple[Mean, ...]:
    """The parts of coefficient * loss, with its gradient, for a `Terms` of it and others.

    Args:
        loss: the loss of an objective.
        logged: its metrics["loss"]: Terms, a Mean, or any number, which is averaged over slices.
    """
    if isinstance(logged, Terms):
        parts = differentiable(logged, loss).parts
        return tuple(part._replace(total=coefficient * part.total) for part in parts)
    weight = jnp.asarray(logged.weight if isinstance(logged, Mean) else 1.0, jnp.float32)
    kind = Undivided if isinstance(logged, Undivided) else Mean
    return (kind(coefficient * loss * weight, weight),)


def with_mean(mean: jax.Array, weight: jax.Array, part: Mean) -> tuple[jax.Array, jax.Array]:
    """(mean, weight) after one more part, whose total and weight are added to a mean of weight `weight`."""
    whole = weight + part.weight
    # Not from the sum so far, which would outgrow float32.
    return mean + (part.total - part.weight * mean) / jnp.maximum(whole, 1e-9), whole


def combine_means(parts: Any) -> Any:
    """One Mean, or Terms, from one whose leaves are stacked over parts on axis 0."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
