"""Writes whole models as GGUF files for llama.cpp and tools built on it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from jaxft.checkpoints.assemble import disassemble, flatten, layer_shapes
from jaxft.checkpoints.gguf import package
from jaxft.checkpoints.gguf_tokenizer import write_tokenizer
from jaxft.models import FAMILIES, CheckpointError, Entry, Family, family_of
from jaxft.models.config import Rope
from jaxft.models.rope import attention_factor, rope_frequencies
from jaxft.parallel import written_once

Params = Any
Kind = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def save_gguf(
    path: str | os.PathLike,
    model: nn.Module,
    params: Params,
    *,
    kind: Kind = "bf16",
    tokenizer: Any = None,
    name: str = "",
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a GGUF file as llama.cpp's converter does, for llama.cpp, Ollama and `load_model`.

    Structured weights are written dense (merged). Matrices have the type `kind`; vectors, and the positions
    of GPT-2, are float32, and matrices whose row length is not a multiple of 32 are float16 if `kind` is
    q8_0. The file appears complete under its name, or not at all. On several hosts all call it, and the
    first writes.

    Args:
        path: the file.
        model: gives the config.
        params: of either layout, plain or adapted.
        kind: the type of matrices.
        tokenizer: a transformers tokenizer, which is written with its chat templates; None: the file
            has none, and needs tokenizer files beside it.
        name: general.name, for human readers.
        families: see load_model.

    Raises:
        CheckpointError: before anything is written, if the format lacks the family or cannot represent
            the config or the tokenizer; also for a number outside float16's range.
    """
    gguf, path = package(), pathlib.Path(path)
    family, config = family_of(model.config, families), model.config
    codec = _codec(family, config)
    if "reward" in params:
        raise CheckpointError("a GGUF file cannot hold a reward head; use save_model.")
    beside, entries = codec.beside(config), codec.entries(config)
    metadata = _metadata(codec, config, kind, name)
    if tokenizer is not None:
        metadata |= write_tokenizer(tokenizer, config)
    shapes = {p: leaf.shape for p, leaf in flatten(layer_shapes(model)).items()}
    plan = {entry.name: _plan(entry, shapes, kind, codec.float32) for entry in entries}
    tensors = disassemble(entries, params, family.layers)

    def write():
        with replacing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, codec.architecture)
            with contextlib.closing(writer):
                add_fields(writer, metadata)
                for tensor, (shape, numbers) in plan.items():
                    _announce(writer, tensor, shape, numbers)
                for tensor, values in beside.items():
                    _announce(writer, tensor, values.shape, "F32")
                begin(writer)
                for tensor, values in tensors:
                    writer.write_tensor_data(encode(tensor, values, plan[tensor][1]))
                for values in beside.values():
                    writer.write_tensor_data(values)

    written_once(write, str(path), tensors)


def check_gguf(
    model: nn.Module, tokenizer: Any = None, families: Sequence[Family] = FAMILIES
) -> None:
    """Raises CheckpointError if a GGUF file cannot represent the model or the tokenizer: see save_gguf."""
    _codec(family_of(model.config, families), model.config)
    if tokenizer is not None:
        write_tokenizer(tokenizer, model.config)


def _codec(family: Family, config: Any) -> Any:
    codec = family.gguf
    if codec is None:
        raise CheckpointError(
            f"{family.name}: jaxft writes no GGUF files of this family; use save_model and llama.cpp's "
            "converter."
        )
    _check_said(codec, config)
    return codec


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`; the file replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add_fields(writer: Any, metadata: Mapping[str, Any]) -> None:
    """Adds metadata under full names: ints as uint32, floats as float32, lists by the first item's type."""
    for key, value in metadata.items():
        if isinstance(value, (list, tuple)):
            writer.add_array(key, value)
        else:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def begin(writer: Any) -> None:
    """Writes everything that precedes the tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def encode(name: str, values: np.ndarray, numbers: str) -> np.ndarray:
    """A tensor in the type of a file.

    Raises:
        CheckpointError: if float16 cannot hold a value, which would become infinite.
    """
    gguf = package()
    values = np.ascontiguousarray(values, np.float32)
    if numbers == "F32":
        return values
    if numbers == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(
            f"tensor {name!r} has values up to {np.abs(values).max():.3g}, beyond float16's 65504; "
            "choose bf16 or f32."
        )
    return gguf.quantize(values, gguf.GGMLQuantizationType[numbers])


def _metadata(codec, config, kind, name):
    gguf = package()
    general = {
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    general |= {"general.name": name} if name else {}
    return general | {f"{codec.architecture}.{k}": v for k, v in codec.write(config).items()}


def _plan(entry: Entry, shapes, kind, float32):
    """(shape in the file, type) of a tensor."""
    parts = [shapes[path] for path in entry.paths]
    shape = (*parts[0][:-1], sum(part[-1] for part in parts))
    shape = shape[::-1] if entry.transposed else shape
    if len(shape) == 1 or entry.name in float32:
        return shape, "F32"
    return shape, "F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()


def _announce(writer, name, shape, numbers):
    gguf = package()
    kind = gguf.GGMLQuantizationType[numbers]
    stored = np.dtype({"F32": "float32", "F16": "float16"}.get(numbers, "uint8"))
    if stored == np.uint8:
        shape = gguf.quant_shape_to_byte_shape(shape, kind)
    size = int(np.prod(shape)) * stored.itemsize
    writer.add_tensor_info(name, shape, stored, size, kind)


class _Said:
    """The header of a file that is still to be written."""

    file = "as GGUF"

    def __init__(self, codec, config):
        self._keys, self._beside = codec.write(config), codec.beside(config)
        self._names = {entry.name for entry in codec.entries(config)} | self._beside.keys()
        self._vocabulary = np.broadcast_to(np.float32(0), (config.vocab_size, 1))

    def get(self, key, default=None):
        return self._keys.get(key, default)

    def has(self, name):
        return name in self._names

    def read(self, name):
        return self._vocabulary if name == "token_embd.weight" else self._beside[name]


def _check_said(codec, config) -> None:
    """Raises CheckpointError unless the metadata, read back, give the same config."""
    said = codec.read(_Said(codec, config))
    for field in dataclasses.fields(config):
        # Llama is written for Mistral too; ids belong to the tokenizer.
        if field.name == "family" or not field.compare:
            continue
        ours, theirs = getattr(config, field.name), getattr(said, field.name)
        if field.name == "windows":
            ours, theirs = (tuple(map(c.window, range(c.num_layers))) for c in (config, said))
        if field.name == "attention_scale":
            ours, theirs = config.scale, said.scale
        if field.name == "local_rope":
            # Only layers with a window use it.
            ours, theirs = (
                c.local_rope or c.rope if any(config.windows) else None for c in (config, said)
            )
        if not _same(ours, theirs, config.head_dim):
            raise CheckpointError(
                f"{config.family}: {field.name} is {_text(ours)}, but a GGUF file of {codec.architecture!r} "
                f"can only mean {_text(theirs)}; use save_model instead."
            )


def _same(ours, theirs, head_dim):
    if isinstance(ours, Rope) and isinstance(theirs, Rope):
        tables = [_turns(rope, head_dim) for rope in (ours, theirs)]
        return np.allclose(*tables, rtol=1e-6, atol=0)
    if isinstance(ours, float) and isinstance(theirs, float):
        return np.isclose(ours, theirs, rtol=1e-6, atol=0)
    return ours == theirs


def _turns(rope, head_dim):
    factor = attention_factor(rope)
    return np.append(rope_frequencies(rope, head_dim), factor)


def _text(value):
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
