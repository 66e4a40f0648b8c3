"""Convolutions whose kernels may be structured weights, each adapted as a matrix [window x in, out]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

from jaxft.weights.base import (
    Weight,
    WeightLike,
    is_weight,
    scaled_bias,
    split_spec,
    to_dense,
)

Sizes = int | Sequence[int]
Padding = str | Sequence[tuple[int, int]]

# Of x and y, and of the kernel, by the number of axes of the window.
_LAYOUTS = {1: ("NWC", "WIO"), 2: ("NHWC", "HWIO"), 3: ("NDHWC", "DHWIO")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvWeight(Weight):
    """A convolution's kernel [*window, in, out], held by any weight of its matrix [window x in, out].

    `adapt` makes it of a kernel that a rule names: the rule sees the matrix. `conv` reads it. It has no
    `committed`: PaCA's rows are written into the dense kernel at each use, inside a step and outside.
    """

    matrix: WeightLike  # rows in the order of the window's axes, then of inputs
    window: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self):
        *stack, rows, columns = self.matrix.shape
        return (*stack, *self.window, rows // math.prod(self.window), columns)

    @property
    def dtype(self):
        return self.matrix.dtype

    @property
    def stack(self):
        return self.matrix.shape[:-2]

    def rmatmul(self, x):
        raise ValueError(
            f"matmul: the weight {self.shape} is a convolution's kernel; read it by jaxft.weights.conv. If "
            "its leading axes are layers or experts, say so in adapt(..., stacked=)."
        )

    def to_dense(self):
        return to_dense(self.matrix).reshape(self.shape)

    def scaled_bias(self, bias):
        return scaled_bias(bias, self.matrix)

    def with_specs(self, spec):
        axes, rows, columns = split_spec(spec, self.ndim)
        # The window is never split: its few places lie with the inputs of each.
        spec = PartitionSpec(*axes[: len(self.stack)], rows, columns)
        matrix = self.matrix.with_specs(spec) if is_weight(self.matrix) else spec
        return dataclasses.replace(self, matrix=matrix)


def conv(
    x: jax.Array,
    w: WeightLike,
    *,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    groups: int = 1,
) -> jax.Array:
    """The convolution of x [B, *places, in] with a kernel [*window, in / groups, out], in x's data type.

    `jax.lax.conv_general_dilated` with channels last, over 1, 2 or 3 axes of places. LoRA and DoRA
    convolve with A and multiply by B at each place; other weights, and all with groups, form the dense
    kernel for the product and again in the backward pass. A module must read its variable by
    `jaxft.models.read`. `flax.linen.Conv` raises an error for structured weights: give it
    `merge(params)`, which is differentiable.

    Args:
        x: the inputs.
        w: a kernel, or what `adapt` made of one.
        strides: of the window, one for all axes or one each.
        padding: "SAME", "VALID", or (before, after) for each axis of places.
        dilation: distance of the window's places, one for all axes or one each.
        groups: feature groups; output channels [i out / groups, (i + 1) out / groups) see the i-th
            part of the inputs alone.

    Raises:
        ValueError: for shapes that do not fit, a weight of a matrix, or stacked kernels.
    """
    window, stack = w.shape[:-2], w.stack if is_weight(w) else ()
    if stack or len(window) not in _LAYOUTS or x.ndim != len(w.shape):
        raise ValueError(
            f"conv: needs x [B, *places, in] and one kernel [*window, in, out] with 1 to 3 axes of "
            f"places, got x {x.shape} and a weight {w.shape}"
            + (f" of which {stack} are stacked: take one off by scan or vmap." if stack else ".")
        )
    if groups < 1 or x.shape[-1] != groups * w.shape[-2] or w.shape[-1] % groups:
        raise ValueError(
            f"conv: a kernel {w.shape} in {groups} groups reads {groups * w.shape[-2]} channels and needs "
            f"outputs that {groups} divides, got x {x.shape}."
        )
    layout = _LAYOUTS[len(window)]
    sizes = lambda n: (n,) * len(window) if isinstance(n, int) else tuple(n)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel.reshape(*window, -1, kernel.shape[-1]).astype(x.dtype),
            sizes(strides),
            padding,
            rhs_dilation=sizes(dilation),
            dimension_numbers=(*layout, layout[0]),
            feature_group_count=groups,
        )

    if not is_weight(w):
        return convolve(x, w)
    matrix = w.matrix if isinstance(w, ConvWeight) else w  # Frozen, of anything
    if groups > 1 or not is_weight(matrix):
        return Weight.rconv(w, x, convolve)
    return matrix.rconv(x, convolve)
