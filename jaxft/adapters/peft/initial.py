"""init_lora_weights: some initialisations change the kernels under an adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.model import Linear, numpy
from jaxft.weights import is_weight, to_dense

# These set A and B, which the file holds, and do not change the kernel.
_PLAIN = ("gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "save it in PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter before "
    "training>), which writes a plain LoRA"
)
_LOST = {
    "pissa_niter": "it subtracted a random part from the base kernels, which the file does not hold",
    "corda": "it subtracted a part from the base kernels that depends on its calibration data",
    "lora_ga": "it subtracted a part from the base kernels that depends on gradients",
    "loftq": "it quantised the base, and the file does not hold that base",
}


def with_initial_base(init: Any, linear: Linear, rank: int, scale: float) -> Linear:
    """The matrix with the base kernels of an adapter that was saved under `init_lora_weights`.

    PEFT's PiSSA and OLoRA subtract a part B A (α/R) from W before training. If the file was
    saved without conversion, the part is computed again from W, as PEFT does when it loads the file:
    for PiSSA (arxiv.org/abs/2404.02948) the R leading singular triplets, for OLoRA
    (arxiv.org/abs/2406.01775) α/R times the first R columns of Q and rows of R in W^T = Q R.

    Args:
        init: the option's value.
        linear: with the model's own kernels.
        rank: R.
        scale: α/R, with rsLoRA α/√R.

    Raises:
        AdapterError: for a value that PEFT does not have, and for values that change the kernels by data that
            are not in the file.
    """
    name = init.lower() if isinstance(init, str) else init
    if name in (True, False, None) or name in _PLAIN:
        return linear
    if name not in ("pissa", "olora"):
        raise AdapterError(_refusal(init))
    if linear.embedding:  # For embeddings, PEFT only initialises A and B.
        return linear
    if any(map(is_weight, linear.kernels)):
        raise AdapterError(
            f"init_lora_weights={init!r} changes the kernels, which are quantised here; load the base model "
            f"without --quantise, or {_CONVERT}."
        )
    if name == "olora" and linear.conv1d:
        raise AdapterError(
            f"init_lora_weights='olora' on GPT-2's Conv1D {linear.name!r}: {_CONVERT}."
        )
    whole = np.concatenate([numpy(to_dense(kernel)) for kernel in linear.kernels], axis=1)
    part = _leading(whole, rank) if name == "pissa" else scale * _orthogonal(whole, rank)
    rest = whole - part
    kernels = tuple(
        jnp.asarray(rest[:, columns], kernel.dtype) for _, kernel, columns in linear.parts()
    )
    return dataclasses.replace(linear, kernels=kernels)


def _leading(kernel: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _orthogonal(kernel: np.ndarray, rank: int) -> np.ndarray:
    q, r = np.linalg.qr(kernel.T)
    return (q[:, :rank] @ r[:rank]).T


def _refusal(init) -> str:
    found = isinstance(init, str) and next((n for n in _LOST if init.lower().startswith(n)), None)
    if found:
        return f"init_lora_weights={init!r} is not supported: {_LOST[found]}; {_CONVERT}."
    known = ", ".join(["true", "false", *_PLAIN, "pissa", "olora"])
    return f"init_lora_weights={init!r} is not supported; expected {known}."
