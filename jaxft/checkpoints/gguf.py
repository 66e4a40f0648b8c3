"""Reads GGUF files, the format of llama.cpp, through the `gguf` package."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.checkpoints.gguf_parts import parts_of
from jaxft.checkpoints.tensor_files import refuse_pointer
from jaxft.models import FAMILIES, CheckpointError, Entry, Family
from jaxft.models.family import find_gguf
from jaxft.models.gguf_keys import check_keys
from jaxft.models.special_ids import SpecialIds

_NUMBERS = ("F16", "F32", "F64")  # other types are blocks of bytes


class GgufTensor:
    """A tensor [out, in] of a GGUF file; indexing dequantises only the blocks that it needs."""

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: Any):
        gguf = package()
        self._data, self._type = tensor.data, tensor.tensor_type
        self._dequantize = gguf.dequantize
        self._block, size = gguf.GGML_QUANT_SIZES[self._type]  # values and bytes
        self._width = size // self._data.itemsize
        self.shape = tuple(int(n) for n in tensor.shape[::-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part in float32; `index` is ..., or a slice for each axis (rows on all axes but the last)."""
        if index is ...:
            index = tuple(slice(0, n) for n in self.shape)
        *rows, columns = index
        first, last = columns.start // self._block, -(-columns.stop // self._block)
        data = self._data[(*rows, slice(first * self._width, last * self._width))]
        if self._type.name == "F64":
            return data.astype(np.float32)
        values = self._dequantize(np.ascontiguousarray(data), self._type)
        start, stop = (edge - first * self._block for edge in (columns.start, columns.stop))
        return values[..., start:stop].astype(np.float32, copy=False)


class GgufFile:
    """A GGUF model of one or several files; it is its own header (jaxft.models.family.GgufHeader).

    Attributes:
        family: the record of its general.architecture.
        config: of its model.
        names: of the tensors that are leaves of the params.
    """

    def __init__(self, file: pathlib.Path, families: Sequence[Family] = FAMILIES):
        readers = {part: open_file(part) for part in parts_of(file)}
        self._fields, self._tensors = join(readers)
        self.file = file
        kind = self.field("general.type", "model")
        if kind != "model":
            raise CheckpointError(
                f"{file}: general.type is {kind!r}, expected a model; pass an adapter with its model."
            )
        self._architecture = self.field("general.architecture")
        try:
            self.family = find_gguf(self._architecture, families)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        codec, prefix = self.family.gguf, f"{self._architecture}."
        keys = [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]
        check_keys(((key, self.get(key)) for key in keys), codec.reads, file)
        for name, tensor in self._tensors.items():
            check_type(file, name, tensor)
        self.names = set(self._tensors) - codec.ignores
        if "token_embd.weight" not in self.names:
            raise CheckpointError(f"{file}: missing tensor 'token_embd.weight'.")
        self.config = codec.read(self)
        self._check_vocabulary()

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a metadata field by its full name."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def special(self) -> SpecialIds:
        """The special ids of the metadata; the ids that end a text, a turn and a message all end a text."""
        find = lambda name: self.field(f"tokenizer.ggml.{name}_token_id")
        ends = dict.fromkeys(find(name) for name in ("eos", "eot", "eom"))
        eos = tuple(int(i) for i in ends if i is not None)
        bos, pad = (None if (i := find(name)) is None else int(i) for name in ("bos", "padding"))
        return SpecialIds(bos=bos, eos=eos, pad=pad)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of the metadata field `<architecture>.<key>`."""
        return self.field(f"{self._architecture}.{key}", default)

    def has(self, name: str) -> bool:
        """Returns whether there is a tensor of this name."""
        return name in self._tensors

    def read(self, name: str) -> GgufTensor:
        """The tensor; indexing dequantises that part."""
        return GgufTensor(self._tensors[name])

    def entries(self) -> list[Entry]:
        """The place of each leaf of the params in the file."""
        return self.family.gguf.entries(self.config)

    def _check_vocabulary(self):
        tokens = self._fields.get("tokenizer.ggml.tokens")
        if tokens is not None and len(tokens.data) != self.config.vocab_size:
            raise CheckpointError(
                f"{self.file}: its tokenizer has {len(tokens.data)} tokens, token_embd.weight "
                f"{self.config.vocab_size} rows; convert the model again with llama.cpp."
            )


def open_file(file: pathlib.Path) -> Any:
    """The gguf package's reader of one file.

    Raises:
        CheckpointError: if it is damaged, or big-endian.
    """
    refuse_pointer(file)
    gguf = package()
    try:
        reader = gguf.GGUFReader(str(file))
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{file}: not a whole GGUF file ({error}); download it again."
        ) from None
    if reader.endianess != gguf.GGUFEndian.LITTLE:  # Its tensors would be read as other numbers.
        raise CheckpointError(
            f"{file}: big-endian, as for s390x; jaxft reads little-endian files. Convert a copy of it: "
            "gguf-convert-endian FILE little (of the package gguf)."
        )
    return reader


def join(readers: dict[pathlib.Path, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the first part, tensors of all) by name.

    Raises:
        CheckpointError: for a part that belongs to another model.
    """
    (first, head), *_ = readers.items()
    value = lambda reader, key: None if key not in reader.fields else reader.fields[key].contents()
    tensors: dict[str, Any] = {}
    for i, (part, reader) in enumerate(readers.items()):
        count, number = value(reader, "split.count"), value(reader, "split.no")
        foreign = (count or 1, number or 0) != (len(readers), i)
        shared = tensors.keys() & {tensor.name for tensor in reader.tensors}
        other = value(reader, "general.architecture")
        if foreign or shared or other not in (None, value(head, "general.architecture")):
            said = f"part {(number or 0) + 1} of {count or 1}"
            said = said if foreign or not shared else f"holds {min(shared)!r} again"
            raise CheckpointError(
                f"{part}: not part {i + 1} of {len(readers)} of {first.name} ({said}); parts are named "
                "NAME-00001-of-00003.gguf and are in one directory. Download them again."
            )
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    total = value(head, "split.tensors.count")
    if len(readers) > 1 and total not in (None, len(tensors)):
        raise CheckpointError(
            f"{first}: split.tensors.count is {total}, but its {len(readers)} parts hold {len(tensors)} "
            "tensors; one of them is of another model. Download the parts again."
        )
    return dict(head.fields), tensors


def check_type(file: pathlib.Path, name: str, tensor: Any) -> None:
    """Raises CheckpointError for a tensor of a type that the gguf package cannot dequantise."""
    kind = tensor.tensor_type
    if kind.name not in _NUMBERS and not _dequantises(kind):
        raise CheckpointError(
            f"{file}: tensor {name!r} is stored as {kind.name}, which the package gguf does not dequantise; "
            "convert the model to another type with llama.cpp."
        )


@functools.cache
def _dequantises(kind: Any) -> bool:
    gguf = package()
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def package() -> Any:
    """The gguf package.

    Raises:
        ModuleNotFoundError: if it is not installed; the message says how to install it.
    """
    try:
        import gguf
    except ImportError:
        raise ModuleNotFoundError(
            "GGUF files need the package gguf: pip install 'jaxft[text]'"
        ) from None
    return gguf
