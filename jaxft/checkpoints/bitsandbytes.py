"""Tensors that bitsandbytes rounded to 4 bits: kept as stored, or dequantised as in bitsandbytes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxft.checkpoints.assemble import Read
from jaxft.kernels.nf4 import NF4_LEVELS
from jaxft.models import CheckpointError, Entry
from jaxft.parallel import path_name
from jaxft.weights import Nf4Weight, nf4_exact

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class FourBitTensor:
    """A weight [out, in] of codes of 4 bits; indexing it dequantises that part, in float32.

    As bitsandbytes stores it (Dettmers et al., 2023, arxiv.org/abs/2305.14314; functional.py there): two
    codes a byte, the first in the high bits, in blocks of the flattened weight; the blocks' largest
    magnitudes are float32, or 8-bit codes in separate blocks around a common offset.
    """

    def __init__(self, packed: np.ndarray, scales: np.ndarray, levels: np.ndarray, state: Mapping):
        self.packed = packed.reshape(-1).view(np.uint8)
        self.scales, self.levels = scales, levels
        self.block: int = state["blocksize"]
        self.shape: tuple[int, ...] = tuple(state["shape"])
        self.dtype = np.dtype(_DTYPES[state["dtype"]])

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        rows = np.arange(self.shape[0])[slice(None) if index[0] is Ellipsis else index[0]]
        columns = np.arange(self.shape[1])[index[1] if len(index) > 1 else slice(None)]
        parts = [
            self._part(some, columns)
            for some in np.array_split(rows, max(1, rows.size * columns.size >> 22))
        ]
        return np.concatenate(parts)

    def _part(self, rows, columns):
        places = rows[:, None] * self.shape[1] + columns[None]
        both = self.packed[places >> 1]
        codes = np.where(places & 1, both & 15, both >> 4)
        return self.levels[codes] * self.scales[places // self.block]

    @property
    def exact(self) -> bool:
        """True if an Nf4Weight can hold the same numbers: NF4's levels, and no block spans two outputs."""
        return np.array_equal(self.levels, NF4_LEVELS) and self.shape[1] % self.block == 0

    def weight(self, dtype: Any) -> Nf4Weight:
        """The kernel [in, out] with the same codes and scales, the latter in float32; if `exact`."""
        outputs, inputs = self.shape
        codes = np.stack([self.packed >> 4, self.packed & 15], axis=-1).reshape(outputs, inputs)
        return nf4_exact(codes.T, self.scales.reshape(outputs, -1).T, dtype)

    def weight_shapes(self, dtype: Any) -> Nf4Weight:
        """The shapes of `weight`."""
        outputs, inputs = self.shape
        codes = jax.ShapeDtypeStruct((inputs // 2, outputs), jnp.uint8)
        scales = jax.ShapeDtypeStruct((inputs // self.block, outputs), jnp.float32)
        return Nf4Weight(codes, scales, None, None, inputs, str(np.dtype(dtype)))


def is_four_bit(config: Mapping[str, Any]) -> bool:
    """Returns whether config.json says that the weights are bitsandbytes' of 4 bits."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return False
    kind = str(settings.get("quant_method", "bitsandbytes")).lower()
    return kind.startswith("bitsandbytes") and bool(settings.get("load_in_4bit"))


def fold_four_bit(
    path: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors with each group `x.weight`, `x.weight.absmax`, ... as one FourBitTensor `x.weight`.

    Raises:
        CheckpointError: if there is none, or the parts of one are missing, damaged or of an unknown kind.
    """
    tensors = dict(tensors)
    states = sorted(name for name in tensors if _STATE in name)
    if not states:
        raise CheckpointError(
            f"{path}: config.json says load_in_4bit, but no tensor is one of bitsandbytes' 4 bits; if the "
            "weights are whole, remove quantization_config from config.json."
        )
    for key in states:
        name, kind = key.split(_STATE)
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in _PARTS}
        try:
            state = json.loads(bytes(np.asarray(tensors.pop(key)).view(np.uint8)))
            if state["quant_type"] != kind or not isinstance(state, dict):
                raise ValueError(f"quant_type {state['quant_type']!r}")
            tensors[name] = _tensor(tensors[name], parts, state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: {name!r} is not a whole 4-bit tensor of bitsandbytes ({type(error).__name__}: "
                f"{error}); download or save the checkpoint again."
            ) from None
    return tensors


def kept(
    path: pathlib.Path, entries: Sequence[Entry], read: Read, layers: str
) -> dict[str, Nf4Weight]:
    """path -> shapes of the kernels that are kept in 4 bits; warns about those that are read dense.

    A kernel is kept if an Nf4Weight can hold it and the same kernel of all other layers, in the same blocks.

    Raises:
        CheckpointError: for GPT-2's own layers, which bitsandbytes transposes.
    """
    groups: dict[str, dict[str, Nf4Weight | None]] = {}
    names = []
    for entry in entries:
        tensor, held = read(entry), None
        if isinstance(tensor, FourBitTensor):
            names.append(entry.name)
            held = tensor.weight_shapes(tensor.dtype) if _holds(path, entry, tensor) else None
        for name in entry.paths:
            place = re.sub(rf"^{re.escape(layers)}/\d+/", f"{layers}/", name)
            groups.setdefault(place, {})[name] = held
    whole = lambda group: None not in group.values() and len(set(map(str, group.values()))) == 1
    found = {name: w for group in groups.values() if whole(group) for name, w in group.items()}
    dense = len(names) - len(found)
    if dense:
        kinds = {entry.name for entry in entries if entry.paths[0] in found}
        warnings.warn(
            f"{path}: {dense} of its {len(names)} 4-bit tensors are dequantised as they are read, such as "
            f"{min(set(names) - kinds)}: no weight of jaxft holds them as they are stored.",
            stacklevel=4,
        )
    return found


def with_kept(shapes: Any, found: Mapping[str, Nf4Weight], dtype: Any) -> Any:
    """The shapes of params with the `found` weights, whose dense form has `dtype`, or the stored type."""

    def place(path, leaf):
        weight = found.get(path_name(path))
        if weight is None or dtype is None:
            return leaf if weight is None else weight
        return dataclasses.replace(weight, dense_dtype=str(np.dtype(dtype)))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _holds(path, entry: Entry, tensor: FourBitTensor) -> bool:
    if entry.paths[0].endswith("/kernel") and not entry.transposed:
        raise CheckpointError(
            f"{path}: {entry.name!r} is a Conv1D in bitsandbytes' 4 bits, which is not supported; use the "
            "model that this was made from, with --quantise nf4."
        )
    whole = entry.expert is None  # experts are several tensors of one leaf
    plain = whole and not (entry.offset or entry.file_shape or entry.permuted_heads)
    return plain and entry.transposed and len(entry.paths) == 1 and tensor.exact


def _tensor(packed, parts: Mapping[str, Any], state: Mapping[str, Any]) -> FourBitTensor:
    """The tensor made from its parts, checked."""
    scales, levels = parts["absmax"], np.asarray(parts["quant_map"], np.float32)
    shape, block = tuple(state["shape"]), state["blocksize"]
    if len(shape) != 2 or levels.shape != (16,) or state["dtype"] not in _DTYPES:
        raise ValueError(f"shape {shape}, {levels.size} levels, dtype {state['dtype']}")
    count = math.prod(shape)
    if packed.nbytes != -(-count // 2) or scales.shape != (-(-count // block),):
        raise ValueError(f"{packed.nbytes} bytes and {scales.size} scales for {shape}")
    if scales.dtype == np.uint8:  # The scales are codes.
        table, groups = parts["nested_quant_map"], parts["nested_absmax"]
        group = np.arange(scales.size) // state["nested_blocksize"]
        # As dequantize_blockwise and the line after it: a rounded product, then a rounded sum.
        offset = np.float32(state["nested_offset"])
        scales = table.astype(np.float32)[scales] * groups.astype(np.float32)[group] + offset
    return FourBitTensor(packed, np.asarray(scales, np.float32), levels, state)
