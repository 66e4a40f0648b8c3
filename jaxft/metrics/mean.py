"""Means that say over what they are taken, so that parts of a batch add up to the whole."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """total / weight, kept apart: the mean of two parts is the sum of totals over that of weights."""

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


def combine_means(parts: Mean) -> Mean:
    """One Mean from a Mean whose fields are stacked over parts on axis 0."""
    return Mean(jnp.sum(parts.total, axis=0), jnp.sum(parts.weight, axis=0))
