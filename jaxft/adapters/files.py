"""The two files of an adapter, of any format: settings as JSON and tensors as safetensors."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxft.adapters.errors import AdapterError
from jaxft.models.json_files import read_json
from jaxft.parallel import to_host, written_once


def read_adapter(
    config: pathlib.Path, weights: pathlib.Path, load: Callable[[pathlib.Path], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, tensors) of both files; `load` is safetensors' `load_file`, of NumPy or of Flax.

    Raises:
        AdapterError: if one is missing or damaged.
    """
    for file in (config, weights):
        if not file.exists():
            raise AdapterError(
                f"{file.parent}: no {file.name}; copy the adapter's directory whole."
            )
    try:
        return read_json(config, AdapterError), load(weights)
    except SafetensorError as error:
        raise AdapterError(f"{weights}: damaged ({error}); copy it again.") from None


def write_adapter(
    config: str | os.PathLike,
    weights: str | os.PathLike,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Any],
    **save: Any,
) -> None:
    """Writes both files; makes their directory if needed. On several hosts all call it, the first writes.

    Args:
        config: path of the JSON.
        weights: path of the safetensors.
        settings: the content of the JSON.
        tensors: arrays, on any devices of all hosts.
        save: more arguments of safetensors' `save_file`.
    """
    config, weights = pathlib.Path(config), pathlib.Path(weights)
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in to_host(dict(tensors)).items()}

    def write():
        for path in (config, weights):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, weights, **save)
        config.write_text(json.dumps(settings, indent=2) + "\n")

    written_once(write, str(config.parent))
