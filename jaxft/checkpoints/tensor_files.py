"""Reads directories of safetensors files tensor by tensor, and writes shards with an index."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxft.models import CheckpointError
from jaxft.models.json_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
}


_POINTER = b"version https://git-lfs"


def open_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """name -> memory-mapped array for every tensor of a Hugging Face directory; nothing is read yet.

    Raises:
        CheckpointError: if there is no safetensors file, one is truncated or missing, or the index of shards
            is damaged or of other shards. A whole model.safetensors takes precedence, as in transformers.
    """
    files, weight_map = _files(directory)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors.update(
            (name, tensor)
            for name, tensor in map_tensors(file).items()
            if weight_map.get(name, file) == file
        )
    for name in sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(
            f"{directory / INDEX}: names tensor {name!r} in {weight_map[name].name}, which does not hold it; "
            "the index and the shards are of different checkpoints, download both again."
        )
    return tensors


def map_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """name -> memory-mapped array for every tensor of one safetensors file."""
    try:
        with safe_open(file, framework="numpy"):  # Checks the header and the file's length.
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; download the checkpoint again.") from None
    except SafetensorError as error:
        refuse_pointer(file)
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); download or save it again."
        ) from None
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: _map(file, name, entry, 8 + size) for name, entry in header.items()}


def refuse_pointer(file: pathlib.Path) -> None:
    """Raises CheckpointError if the file is a Git LFS pointer, which a clone without LFS leaves there."""
    with open(file, "rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{file}: a Git LFS pointer instead of the tensors; fetch them by `git lfs pull`."
            )


def save_tensors(
    directory: pathlib.Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes named tensors to model.safetensors, or to shards with an index if they are too large.

    Only one shard is in memory at a time.
    """
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    filled = total = 0

    def flush():
        save_file(shard, directory / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > shard_bytes:
            flush()
            filled = 0
        shard[name] = np.ascontiguousarray(tensor)
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(directory, shards, total)


def _name_shards(directory, shards, total):
    for stale in [*directory.glob("model*.safetensors"), directory / INDEX]:
        stale.unlink(missing_ok=True)
    temporary = [directory / f"shard-{i}.tmp" for i in range(len(shards))]
    if len(shards) == 1:
        temporary[0].rename(directory / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, name in zip(temporary, names, strict=True):
        file.rename(directory / name)
    weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2))


def _files(directory):
    """(the files, tensor -> its file by the index, if any)."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE], {}
    if (directory / INDEX).exists():
        weight_map = _read_index(directory)
        return sorted(set(weight_map.values())), weight_map
    shards = sorted(path.name for path in directory.glob("model-*-of-*.safetensors"))
    if shards:
        hint = f"it holds the shards {', '.join(shards[:3])}... without {INDEX}; download that too"
    elif list(directory.glob("pytorch_model*.bin")):
        hint = "it holds only pickled weights, which jaxft never loads; convert them to safetensors"
    else:
        hint = f"expected {SINGLE} or {INDEX}"
    raise CheckpointError(f"{directory}: no safetensors weights; {hint}.")


def _read_index(directory):
    """tensor -> existing file, from the index."""
    index = directory / INDEX
    try:
        weight_map = read_json(index)["weight_map"]
        names = set(weight_map.values())
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map names no files")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({type(error).__name__}: {error}); expected JSON with a "
            "weight_map of tensors to files. Download it again."
        ) from None
    for name in sorted(names):
        parts = pathlib.PurePosixPath(os.path.normpath(name.replace("\\", "/"))).parts
        if not parts or parts[0] in ("/", "..") or ":" in parts[0]:
            raise CheckpointError(f"{index}: {name!r} points outside the directory; refused.")
    missing = [name for name in sorted(names) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} files are missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; download the rest of the checkpoint."
        )
    return {tensor: directory / name for tensor, name in weight_map.items()}


def _map(file, name, entry, start):
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has the unsupported type {entry['dtype']}.")
    begin, end = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if begin == end:
        return np.zeros(entry["shape"], dtype)
    raw = np.memmap(file, np.uint8, "r", start + begin, (end - begin,))
    return raw.view(dtype).reshape(entry["shape"])
