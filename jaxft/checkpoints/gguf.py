"""GGUF files, the format of llama.cpp, through the `gguf` package: read only."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.models import FAMILIES, CheckpointError, Entry, Family
from jaxft.models.family import find_gguf
from jaxft.models.special_ids import SpecialIds

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


class GgufTensor:
    """A tensor [out, in] of a GGUF file, of which the blocks are dequantised that an index touches."""

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: Any):
        gguf = _package()
        self._data, self._type = tensor.data, tensor.tensor_type
        self._dequantize = gguf.dequantize
        self._block, size = gguf.GGML_QUANT_SIZES[self._type]  # values and bytes
        self._width = size // self._data.itemsize
        self.shape = tuple(int(n) for n in tensor.shape[::-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part in float32; `index`: ..., or for each axis a slice or, but on the last, rows."""
        if index is ...:
            index = tuple(slice(0, n) for n in self.shape)
        *rows, columns = index
        first, last = columns.start // self._block, -(-columns.stop // self._block)
        data = self._data[(*rows, slice(first * self._width, last * self._width))]
        values = self._dequantize(np.ascontiguousarray(data), self._type)
        start, stop = (edge - first * self._block for edge in (columns.start, columns.stop))
        return values[..., start:stop].astype(np.float32, copy=False)


class GgufFile:
    """A GGUF file, which is its own header (jaxft.models.family.GgufHeader).

    Attributes:
        family: the record of its general.architecture.
        config: of its model.
        names: of its tensors, without those that are no leaf of the params.
    """

    def __init__(self, file: pathlib.Path, families: Sequence[Family] = FAMILIES):
        gguf = _package()
        try:
            self._reader = gguf.GGUFReader(str(file))
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a whole GGUF file ({error}); download it again."
            ) from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.file = file
        self._architecture = self._value("general.architecture")
        try:
            self.family = find_gguf(self._architecture, families)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        self.names = set(self._tensors) - self.family.gguf.ignores
        self.config = self.family.gguf.read(self)

    def special(self) -> SpecialIds:
        """The special ids of the metadata: the ends of a text, of a turn and of a message all end."""
        find = lambda name: self._value(f"tokenizer.ggml.{name}_token_id")
        ends = dict.fromkeys(find(name) for name in ("eos", "eot", "eom"))
        eos = tuple(int(i) for i in ends if i is not None)
        bos, pad = (None if (i := find(name)) is None else int(i) for name in ("bos", "padding"))
        return SpecialIds(bos=bos, eos=eos, pad=pad)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of the metadata field `<architecture>.<key>`."""
        return self._value(f"{self._architecture}.{key}", default)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    def read(self, name: str) -> GgufTensor:
        """The tensor, which is dequantised where it is indexed."""
        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind not in TYPES:
            raise CheckpointError(
                f"{self.file}: tensor {name!r} is stored as {kind}; supported: {', '.join(TYPES)}."
            )
        return GgufTensor(tensor)

    def entries(self) -> list[Entry]:
        """Where each leaf of the params lies in the file."""
        return self.family.gguf.entries(self.config)

    def _value(self, name, default=None):
        field = self._reader.get_field(name)
        return default if field is None else field.contents()


def _package():
    try:
        import gguf
    except ImportError:
        raise ModuleNotFoundError(
            "reading GGUF files needs the package gguf: pip install 'jaxft[text]'"
        ) from None
    return gguf
