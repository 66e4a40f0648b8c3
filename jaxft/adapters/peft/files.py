"""The two files of an adapter: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.files import read_adapter, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Settings = dict[str, Any]
Tensors = dict[str, np.ndarray]


def read_files(path: pathlib.Path) -> tuple[Settings, Tensors]:
    """(settings, tensors) of an adapter's directory.

    Raises:
        AdapterError: if a file is missing or damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            pickled = "adapter_model.bin is pickled; convert it"
            hint = pickled if name == WEIGHTS else _found(path)
            raise AdapterError(f"no {name}; {hint}.")
    return read_adapter(path / CONFIG, path / WEIGHTS, load_file)


def _found(path):
    """The contents of a directory without adapter_config.json, for an error."""
    if (path / "config.json").exists():
        return "it holds a whole model; give that as the model"
    names = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
    return (
        f"it holds the adapters {', '.join(names)}; give one" if names else "is it a PEFT adapter?"
    )


def write_files(path: pathlib.Path, settings: Settings, tensors: Tensors) -> None:
    """Writes both files; the directory is made if needed."""
    write_adapter(path / CONFIG, path / WEIGHTS, settings, tensors, metadata={"format": "pt"})


def take(tensors: Tensors, key: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Removes a tensor from `tensors` and returns it; the tensors left at the end are surplus.

    Args:
        tensors: the tensor is removed.
        key: its name.
        shape: the expected shape.
        dtype: the type of the result; None: as stored.

    Raises:
        AdapterError: if the tensor is missing or has another shape.
    """
    if key not in tensors:
        raise AdapterError(f"missing key {key!r}; the file is not whole, or for another model.")
    tensor = tensors.pop(key)
    if tensor.shape != shape:
        raise AdapterError(
            f"{key!r} has shape {tensor.shape}, the model and the config need {shape}."
        )
    return tensor if dtype is None else tensor.astype(dtype)
