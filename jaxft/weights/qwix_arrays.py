"""Converts quantised kernels from and to qwix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxft.weights.quantised import Nf4Weight, QuantisedWeight, nf4_codes, nf4_from_codes

if TYPE_CHECKING:
    from qwix import QArray

_SIGNED = ("int8", "int4", "float8_e4m3fn")


def from_qwix(array: QArray) -> QuantisedWeight | Nf4Weight:
    """The weight that holds a qwix QArray [D, F]; int8, int4 and fp8 share its arrays without a copy.

    These have the same values bit for bit, in the data type of the QArray's scale. "nf4" keeps
    its codes, but its scales are quantised to 8 bits as `nf4_weight` does.

    Args:
        array: the result of qwix.quantize(kernel, qtype, channelwise_axes=[1], tiled_axes={0:
            block}); without tiled_axes all inputs share a scale.

    Raises:
        ValueError: for another type, rank or tiling, or a zero point.
    """
    values, scale, kind = array.qvalue, array.scale, array.qtype
    kind = kind if isinstance(kind, str) else jnp.dtype(kind).name
    if kind not in (*_SIGNED, "nf4"):
        raise ValueError(
            f"from_qwix: qtype {kind} has no weight; expected nf4, {', '.join(_SIGNED)}."
        )
    if array.zero_point is not None:
        raise ValueError("from_qwix: the array has a zero point; quantise it by absmax.")
    if values.ndim != 2 or scale.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"from_qwix: needs a matrix with separate scales for each column, got {values.shape} "
            f"and scales {scale.shape}; quantise with channelwise_axes=[1]."
        )
    if kind == "nf4":
        return nf4_from_codes(values.astype(jnp.uint8), scale.astype(jnp.float32), scale.dtype)
    return QuantisedWeight(values, scale, str(scale.dtype))


def to_qwix(weight: QuantisedWeight | Nf4Weight) -> QArray:
    """The weight as a QArray; int8, int4 and fp8 share their arrays without a copy.

    qwix dequantises in the data type of the scales, float32 unless they came from qwix. Needs qwix.

    Raises:
        ValueError: for another weight, or blocks that overhang.
    """
    from qwix import QArray

    if isinstance(weight, QuantisedWeight):
        return QArray(weight.values, weight.scale, None, weight.values.dtype)
    if not isinstance(weight, Nf4Weight):
        raise ValueError(f"to_qwix: needs a quantised weight, got {type(weight).__name__}.")
    codes = nf4_codes(weight)
    if len(codes) != weight.features:
        raise ValueError(
            f"to_qwix: the last block of {weight.features} inputs overhangs, which qwix does not support; "
            "quantise with a block that divides them."
        )
    return QArray(codes.astype(jnp.uint4), weight.scales(), None, "nf4")
