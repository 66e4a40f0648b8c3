"""init_lora_weights: the kernels that an adapter stands on, which some initialisations change."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.model import Linear, numpy
from jaxft.weights import is_weight, to_dense

# They set A and B, which the file holds, and leave the kernel alone.
_PLAIN = ("gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "save it in PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter before "
    "training>), which writes a plain LoRA"
)
_LOST = {
    "pissa_niter": "it took a random share of the kernels out of the base, which the file does not hold",
    "corda": "it took a share of the kernels out of the base, which its calibration data decide",
    "lora_ga": "it took a share of the kernels out of the base, which gradients decide",
    "loftq": "it quantised the base as it went, and the file does not hold that base",
}


def with_initial_base(init: Any, linear: Linear, rank: int, scale: float) -> Linear:
    """The matrix with the kernels that an adapter saved under `init_lora_weights` stands on.

    PEFT's PiSSA and OLoRA take a part of W out of it, B A (α/R), before training. Where the file was
    saved without conversion the part is computed again from W, as PEFT does when it loads the file:
    of PiSSA (arxiv.org/abs/2404.02948) the R leading singular triplets, of OLoRA
    (arxiv.org/abs/2406.01775) α/R times the first R columns of Q and rows of R in W^T = Q R.

    Args:
        init: the option's value.
        linear: with the model's own kernels.
        rank: R.
        scale: α/R, with rsLoRA α/√R.

    Raises:
        AdapterError: for a value that PEFT does not have, and those that change the kernels by what is
            not in the file.
    """
    name = init.lower() if isinstance(init, str) else init
    if name in (True, False, None) or name in _PLAIN:
        return linear
    if name not in ("pissa", "olora"):
        raise AdapterError(_refusal(init))
    if linear.embedding:  # PEFT initialises A and B of embeddings alone.
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
