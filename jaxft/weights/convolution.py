"""Convolutions whose kernels may be structured weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxft.weights.base import Weight, WeightLike, is_weight
from jaxft.weights.reshaped import ReshapedWeight

Sizes = int | Sequence[int]
Padding = str | Sequence[tuple[int, int]]

# Layouts of x and y, and of the kernel, by the number of axes of the window.
_LAYOUTS = {1: ("NWC", "WIO"), 2: ("NHWC", "HWIO"), 3: ("NDHWC", "DHWIO")}


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

    It is `jax.lax.conv_general_dilated` with channels last, over 1, 2 or 3 axes of places. LoRA and DoRA
    convolve with A and multiply by B at each place; other weights, and all weights with groups, form the
    dense kernel for the product and again in the backward pass. A module must read its variable by
    `jaxft.models.read`. `flax.linen.Conv` raises an error for structured weights: give it
    `merge(params)`, which is differentiable.

    Args:
        x: the inputs.
        w: a kernel, or a weight made by `adapt`.
        strides: of the window, one for all axes or one each.
        padding: "SAME", "VALID", or (before, after) for each axis of places.
        dilation: distance of the window's places, one for all axes or one each.
        groups: feature groups; output channels [i out / groups, (i + 1) out / groups) only use the i-th
            part of the inputs.

    Raises:
        ValueError: for shapes that do not match, a weight that is a matrix, or stacked kernels.
    """
    window, stack = w.shape[:-2], w.stack if is_weight(w) else ()
    heads = isinstance(w, ReshapedWeight) and len(w.outputs) > 1
    if stack or heads or len(window) not in _LAYOUTS or x.ndim != len(w.shape):
        raise ValueError(
            f"conv: needs x [B, *places, in] and one kernel [*window, in, out] with 1 to 3 axes of "
            f"places, got x {x.shape} and a weight {w.shape}"
            + (f" of which {stack} are stacked: take one off by scan or vmap." if stack else ".")
            + (f" Its outputs are {w.outputs}: adapt(..., input_axes=) said so." if heads else "")
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
    matrix = w.matrix if isinstance(w, ReshapedWeight) else w  # Frozen, of anything
    if groups > 1 or not is_weight(matrix):
        return Weight.rconv(w, x, convolve)
    return matrix.rconv(x, convolve)
