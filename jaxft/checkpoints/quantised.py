"""Refuses checkpoints with quantised weights in formats that no weight supports, by name."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.models import CheckpointError
from jaxft.models.json_files import read_json

# Separate files in which older tools describe the quantisation.
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_KEYS = ("quantization_config", "compression_config", "quantization")
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8 (finegrained)",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "mlx": "MLX",
}
# Suffixes of tensor names that only quantised weights have, and their formats.
_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    "_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".weight._data": "Quanto",
    ".codebooks": "AQLM",
    ".biases": "MLX",
}
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def refuse_quantised(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if config.json, or the file of an older tool, declares quantised weights."""
    text = config.get("text_config") or {}
    for key in _KEYS:
        settings = config.get(key) or text.get(key)
        if settings:
            kind = settings.get("quant_method") if isinstance(settings, dict) else str(settings)
            refuse(path, _kind(settings, kind or _assumed(key)), f"{key} in config.json")
    for name in _FILES:
        if (path / name).exists():
            settings = read_json(path / name)
            assumed = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
            refuse(path, _kind(settings, assumed.get(name, "modelopt")), name)


def refuse_quantised_tensors(path: pathlib.Path, names: Iterable[str]) -> None:
    """Raises CheckpointError if a name belongs to a part of a quantised weight."""
    for name in sorted(names):
        for end, kind in _TENSORS.items():
            if name.endswith(end):
                refuse(path, kind, f"tensor {name!r}")


def check_floats(path: pathlib.Path, name: str, dtype: Any) -> None:
    """Raises CheckpointError for a weight that is not stored as floats of 16 bits or more."""
    if np.dtype(dtype) not in _FLOATS:
        kind = f"of type {np.dtype(dtype).name}"
        refuse(path, kind, f"tensor {name!r}, where floats were expected")


def refuse(path: pathlib.Path, kind: str, where: str) -> None:
    """Raises the CheckpointError for a quantised checkpoint of a `kind`, found at `where`."""
    raise CheckpointError(
        f"{path}: its weights are quantised ({kind}: {where}), and jaxft reads unquantised ones, "
        "bitsandbytes' 4 bits, gpt-oss in MXFP4, FP8 in blocks and GGUF files; use the model that this was "
        "made from, with --quantise int8 or nf4."
    )


def _kind(settings, kind):
    kind = str(kind).lower().replace("bitsandbytes_4bit", "bitsandbytes").replace("_8bit", "")
    bits = settings.get("bits", settings.get("w_bit")) if isinstance(settings, dict) else None
    bits = bits or next((n for n in (4, 8) if _loads(settings, n)), None)
    name = _NAMES.get(kind, kind)
    return f"{name}, {bits} bit" if bits else name


def _loads(settings, bits):
    return isinstance(settings, dict) and settings.get(f"load_in_{bits}bit")


def _assumed(key):
    return {"compression_config": "compressed-tensors", "quantization": "mlx"}.get(key, "unnamed")
