"""Kernels of more than two axes as matrices: convolutions, and attention's kernels with an axis of heads."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec

from jaxft.weights.base import Weight, WeightLike, is_weight, scaled_bias, to_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReshapedWeight(Weight):
    """A kernel [*inputs, *outputs], stored as any weight of its matrix [product of inputs, of outputs].

    A convolution's inputs are [*window, in]; `jaxft.weights.conv` reads it. Flax's attention has queries
    [in, heads, head size] and an output [heads, head size, out]; it reads `merge(params)`. `adapt` makes
    it from a kernel whose `input_axes` are given: the rule gets the matrix. It has no `committed`: PaCA's
    rows are written into the dense kernel at each use, inside a step and outside.
    """

    matrix: WeightLike  # rows and columns in the order of the kernel's axes
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return (*self.stack, *self.inputs, *self.outputs)

    @property
    def dtype(self):
        return self.matrix.dtype

    @property
    def stack(self):
        return self.matrix.shape[:-2]

    def rmatmul(self, x):
        raise ValueError(
            f"matmul: the weight {self.shape} has inputs {self.inputs} and outputs {self.outputs}; read a "
            "convolution's kernel by jaxft.weights.conv, others from merge(params). If its leading axes "
            "are layers or experts, set adapt(..., stacked=)."
        )

    def to_dense(self):
        return to_dense(self.matrix).reshape(self.shape)

    def scaled_bias(self, bias):
        flat = bias.reshape(*bias.shape[: bias.ndim - len(self.outputs)], math.prod(self.outputs))
        return scaled_bias(flat, self.matrix).reshape(bias.shape)

    def with_specs(self, spec):
        axes = (*spec, *(None,) * (self.ndim - len(spec)))
        start = len(self.stack)
        middle = start + len(self.inputs)
        # Only one of several axes is split: the last that the spec names, a convolution's channels.
        last = lambda names: next((name for name in reversed(names) if name is not None), None)
        spec = PartitionSpec(*axes[:start], last(axes[start:middle]), last(axes[middle:]))
        matrix = self.matrix.with_specs(spec) if is_weight(self.matrix) else spec
        return dataclasses.replace(self, matrix=matrix)
