"""Bottleneck adapters: two small projections after, or parallel to, a sublayer of a transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.weights.base import WeightLike, matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """y + s f(h D) U for a sublayer's output y, bias included; h is y (serial) or its input x (parallel).

    Serial: Houlsby et al., 2019, arxiv.org/abs/1902.00751, figure 2, without biases (there s = 1).
    Parallel: He et al., 2021, arxiv.org/abs/2110.04366, table 1 (s = 4).
    The sum is the input of what follows the sublayer: the residual, or a norm before it (Gemma, BERT).
    It is not a `Weight`: it represents no kernel and cannot be merged into one. Its two kernels are
    ordinary weights: plain arrays, which train.
    """

    down: WeightLike  # D [features, R]
    up: WeightLike  # U [R, features], zeros at first, so that training starts from the base model
    activation: Callable[[jax.Array], jax.Array] = dataclasses.field(
        default=jax.nn.relu, metadata={"static": True}
    )
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    reads: Literal["output", "input"] = dataclasses.field(
        default="output", metadata={"static": True}
    )

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The output of a sublayer whose input was x and whose output was y, [..., features] each."""
        h = y if self.reads == "output" else x
        return y + self.scale * matmul(self.activation(matmul(h, self.down)), self.up)


def bottleneck_adapter(
    key: jax.Array,
    features: int,
    *,
    size: int = 64,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    scale: float = 1.0,
    reads: Literal["output", "input"] = "output",
) -> Bottleneck:
    """A Bottleneck that initially changes nothing: D uniform in ±1/sqrt(features), U zero, float32.

    Raises:
        ValueError: for a size outside 1..features, or an unknown `reads`.
    """
    if not 1 <= size <= features:
        raise ValueError(
            f"bottleneck: size must lie in 1..{features}, the features of the sublayer, got {size}."
        )
    if reads not in ("output", "input"):
        raise ValueError(f"bottleneck: reads must be 'output' or 'input', got {reads!r}.")
    bound = features**-0.5
    down = jax.random.uniform(key, (features, size), jnp.float32, -bound, bound)
    up = jnp.zeros((size, features), jnp.float32)
    return Bottleneck(down, up, activation, float(scale), reads)
