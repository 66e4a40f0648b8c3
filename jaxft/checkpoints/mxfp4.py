"""Kernels of experts in MXFP4, as gpt-oss has them in its files: dequantised while they are read."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.models import CheckpointError

_BLOCK = 32  # inputs with one scale
# E2M1: a sign, two bits of exponent, one of mantissa.
_POSITIVE = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEVELS = np.concatenate([_POSITIVE, -_POSITIVE])


class Mxfp4Tensor:
    """Kernels [E, in, out] of 4-bit floats; indexing dequantises that part, in bfloat16, without rounding.

    OCP Microscaling Formats 1.0, 2023: 32 inputs share a scale 2^(s - 127). s = 255, which is NaN there, is
    2^128 here as in transformers' `convert_moe_packed_tensors`.
    """

    def __init__(self, blocks: np.ndarray, scales: np.ndarray):
        self.blocks, self.scales = blocks, scales  # [E, out, in/32, 16] and [E, out, in/32], uint8
        experts, outputs, groups = scales.shape
        self.shape: tuple[int, ...] = (experts, groups * _BLOCK, outputs)
        self.dtype = np.dtype(ml_dtypes.bfloat16)

    def __getitem__(self, index: Any) -> np.ndarray:
        index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        experts, inputs, outputs = (*index, *[slice(None)] * (3 - len(index)))
        chosen = range(self.shape[0])[experts]
        start, stop, _ = inputs.indices(self.shape[1])
        groups = slice(start // _BLOCK, -(-stop // _BLOCK))
        inside = slice(start - groups.start * _BLOCK, stop - groups.start * _BLOCK)
        width = len(range(self.shape[2])[outputs])
        found = np.empty((len(chosen), stop - start, width), self.dtype)
        for i, e in enumerate(
            chosen
        ):  # one at a time: float32 takes eight times the memory of codes
            found[i] = self._part(e, outputs, groups)[:, inside].T
        return found

    def _part(self, expert, outputs, groups):
        """[out, in] in float32, of whole blocks."""
        packed = np.asarray(self.blocks[expert, outputs, groups])
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], _BLOCK)
        powers = np.asarray(self.scales[expert, outputs, groups]).astype(np.int32) - 127
        with np.errstate(over="ignore"):
            values = np.ldexp(LEVELS[codes], powers[..., None])
        return values.reshape(len(values), -1)


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Returns whether config.json says that the experts of a gpt-oss are in MXFP4."""
    settings = config.get("quantization_config")
    kind = settings.get("quant_method") if isinstance(settings, dict) else None
    return kind == "mxfp4" and config.get("model_type") == "gpt_oss"


def fold_mxfp4(
    path: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors with each pair `x_blocks`, `x_scales` as one Mxfp4Tensor `x`.

    Raises:
        CheckpointError: if there is none, or the parts of one do not fit.
    """
    tensors = dict(tensors)
    names = sorted(name for name in tensors if name.endswith("_blocks"))
    if not names:
        raise CheckpointError(
            f"{path}: config.json says mxfp4, but no tensor is in MXFP4 (*_blocks, *_scales); if the weights "
            "are whole, remove quantization_config from config.json."
        )
    for key in names:
        name = key.removesuffix("_blocks")
        blocks, scales = tensors.pop(key), tensors.pop(f"{name}_scales", None)
        fits = scales is not None and blocks.shape == (*scales.shape, _BLOCK // 2)
        if not fits or scales.ndim != 3 or {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}:
            raise CheckpointError(
                f"{path}: {key!r} {blocks.shape} and its scales {getattr(scales, 'shape', 'are missing')}: "
                "expected uint8 [E, out, in/32, 16] and [E, out, in/32]; download the checkpoint again."
            )
        tensors[name] = Mxfp4Tensor(blocks, scales)
    return tensors
