"""Kernels in FP8 with a scale for each block, as DeepSeek-V3 has them: dequantised while they are read."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.models import CheckpointError

_SCALES = "_scale_inv"  # after the name of a weight


class Fp8Tensor:
    """A weight [out, in] of FP8 numbers; indexing multiplies that part by its blocks' scales, in float32.

    DeepSeek-V3, 2024, arxiv.org/abs/2412.19437, section 3.3.2. The last blocks of a row or column may be
    smaller.
    """

    def __init__(self, weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]):
        self.weight, self.scales, self.block = weight, scales, block
        self.shape: tuple[int, ...] = weight.shape
        self.dtype = np.dtype(ml_dtypes.bfloat16)

    def __getitem__(self, index: Any) -> np.ndarray:
        index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        rows, columns = (*index, *[slice(None)] * (2 - len(index)))
        blocks = [
            np.arange(size)[part] // block
            for size, part, block in zip(self.shape, (rows, columns), self.block, strict=True)
        ]
        part = np.asarray(self.weight[rows, columns]).astype(np.float32)
        return part * np.asarray(self.scales, np.float32)[np.ix_(*blocks)]


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Returns whether config.json says that the weights are FP8 in blocks."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return False
    block = settings.get("weight_block_size")
    return isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)


def fold_fp8(
    path: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors with each pair `x.weight`, `x.weight_scale_inv` as one Fp8Tensor `x.weight`.

    Raises:
        CheckpointError: if there is none, or the parts of one do not fit.
    """
    tensors, block = dict(tensors), tuple(config["quantization_config"]["weight_block_size"])
    names = sorted(name for name in tensors if name.endswith(f".weight{_SCALES}"))
    if not names or min(block) < 1:
        raise CheckpointError(
            f"{path}: config.json says fp8 in blocks of {block}, but no weight has scales "
            f"(*.weight{_SCALES}); if the weights are whole, remove quantization_config from config.json."
        )
    for key in names:
        name, scales = key.removesuffix(_SCALES), tensors.pop(key)
        weight = tensors.get(name)
        if weight is None or weight.ndim != 2 or weight.dtype != ml_dtypes.float8_e4m3fn:
            found = "missing" if weight is None else f"{weight.dtype} {weight.shape}"
            raise CheckpointError(
                f"{path}: {name!r} is {found}, expected a matrix in FP8 (E4M3), which {key!r} scales."
            )
        expected = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True))
        if scales.shape != expected:
            raise CheckpointError(
                f"{path}: {key!r} has shape {scales.shape}, expected {expected}: a scale for each block of "
                f"{block}."
            )
        tensors[name] = Fp8Tensor(weight, scales, block)
    return tensors
