"""Learned scales of inputs or outputs: (IA)^3."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.weights.base import (
    Weight,
    WeightLike,
    along_last,
    frozen_field,
    frozen_matmul,
    is_weight,
    split_spec,
    to_dense,
    wide,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledWeight(Weight):
    """W diag(s) for side="output", diag(s) W for side="input"; s trains.

    (IA)^3: Liu et al., 2022, arxiv.org/abs/2205.05638, section 3.3: outputs are scaled together with the
    layer's bias, (x W + b) diag(s).
    """

    base: WeightLike = frozen_field()  # W [D, F]
    scale: jax.Array  # [D] or [F], ones at first
    side: Literal["input", "output"] = dataclasses.field(
        default="output", metadata={"static": True}
    )

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def rmatmul(self, x):
        scale = along_last(self.scale, x).astype(x.dtype)
        if self.side == "input":
            return frozen_matmul(x * scale, self.base)
        return frozen_matmul(x, self.base) * scale

    def scaled_bias(self, bias):
        return bias * self.scale.astype(bias.dtype) if self.side == "output" else bias

    def to_dense(self):
        dense = jax.lax.stop_gradient(to_dense(self.base))
        scale = self.scale[:, None] if self.side == "input" else self.scale[None]
        return (wide(dense) * scale).astype(dense.dtype)

    def with_specs(self, spec):
        stack, rows, columns = split_spec(spec, self.ndim)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        scale = PartitionSpec(*stack, rows if self.side == "input" else columns)
        return dataclasses.replace(self, base=base, scale=scale)


def scaled_weight(
    key: jax.Array, kernel: WeightLike, *, side: Literal["input", "output"] = "output"
) -> ScaledWeight:
    """A ScaledWeight that equals `kernel` [D, F]; `key` is not used.

    Raises:
        ValueError: for a kernel that is not a matrix, or an unknown side.
    """
    del key
    if len(kernel.shape) != 2 or side not in ("input", "output"):
        raise ValueError(
            "scaled: needs a matrix [in, out] and side 'input' or 'output', got a weight of shape "
            f"{kernel.shape} and {side!r}."
        )
    return ScaledWeight(kernel, jnp.ones(kernel.shape[0 if side == "input" else 1]), side)
