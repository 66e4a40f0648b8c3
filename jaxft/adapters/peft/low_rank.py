"""VBLORA and HRA: types whose update has a low rank; they are read and saved as LoRA."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import Linear, Model, no_conv1d, numpy, targeted
from jaxft.weights import LoraWeight, to_dense

_BANK = "base_model.vblora_vector_bank"


def read_vblora(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LoraWeight]:
    """path -> LoRA; takes vblora_logits_A [R, in / l, h], _B [out / l, R, h] and the bank [h, l].

    VB-LoRA: Li et al., 2024, arxiv.org/abs/2405.15179, eq. 2 and 3: each piece of l numbers of A and B is
    the softmax-weighted mean of the k vectors of the bank with the largest logits. With
    save_only_topk_weights the file has the k indices, and all weights except the last.
    """
    count, length, rank = (settings[name] for name in ("num_vectors", "vector_length", "r"))
    bank = take(tensors, _BANK, (count, length))
    found = {}
    for linear in _chosen(settings, tensors, model):
        if linear.inputs % length or linear.outputs % length:
            raise AdapterError(
                f"vector_length={length} does not divide {linear.name!r}, {linear.inputs} x {linear.outputs}."
            )
        shapes = (rank, linear.inputs // length), (linear.outputs // length, rank)
        pieces = [
            _pieces(settings, tensors, linear.key(f"vblora_logits_{name}"), shape, bank)
            for name, shape in zip("AB", shapes, strict=True)
        ]
        a = pieces[0].reshape(rank, -1).T
        b = np.moveaxis(pieces[1], 1, 0).reshape(rank, -1)  # [out / l, R, l] -> [R, out]
        found |= _lora(linear, a, b)
    return found


def read_hra(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LoraWeight]:
    """path -> LoRA; takes hra_u [in, R].

    Householder reflection adaptation: Yuan et al., 2024, arxiv.org/abs/2405.17484, eq. 3: W^T times
    H_1 ... H_R, each I - 2 u u^T. For rows x that is Q^T W, and the columns of Q^T - I lie in the span of U:
    with a basis P of this span, the update is P (P^T (Q^T - I) W), of rank R.
    """
    found = {}
    for linear in _chosen(settings, tensors, model):
        no_conv1d(linear, "HRA")
        u = take(tensors, linear.key("hra_u"), (linear.inputs, settings["r"]))
        if settings["apply_GS"]:
            u = _gram_schmidt(u)
        u = u / np.linalg.norm(u, axis=0)
        basis, inside = np.linalg.qr(u)  # U = P inside
        turned = np.eye(len(inside), dtype=np.float32)
        for column in inside.T:
            turned = turned - 2 * np.outer(turned @ column, column)
        kernel = numpy(to_dense(linear.kernels[0]))
        b = (turned.T - np.eye(len(turned), dtype=np.float32)) @ (basis.T @ kernel)
        found |= _lora(linear, basis, b)
    return found


def _chosen(settings, tensors, model: Model) -> list[Linear]:
    chosen = set(targeted(settings, tensors, model))
    return [linear for linear in model.linears if linear.name in chosen]


def _lora(linear: Linear, a: np.ndarray, b: np.ndarray) -> dict[str, LoraWeight]:
    """path -> LoRA with the update a b."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    return {
        path: LoraWeight(kernel, a, b[:, columns], float(a.shape[1]))
        for path, kernel, columns in linear.parts()
    }


def _pieces(settings, tensors, key, shape, bank) -> np.ndarray:
    """[*shape, l]: weighted means of vectors of the bank."""
    k = settings["topk"]
    if settings["save_only_topk_weights"]:
        indices = take(tensors, f"{key}_topk_indices", (*shape, k), np.int64)
        if indices.min() < 0 or indices.max() >= len(bank):
            raise AdapterError(f"{key}_topk_indices must lie in 0..{len(bank) - 1}.")
        weights = take(tensors, f"{key}_topk_weights", (*shape, k - 1))
        weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
    else:
        logits = take(tensors, key, (*shape, len(bank)))
        indices = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
        logits = np.take_along_axis(logits, indices, -1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
    return np.einsum("...k,...kl->...l", weights, bank[indices])


def _gram_schmidt(u: np.ndarray) -> np.ndarray:
    columns: list[np.ndarray] = []
    for column in u.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)
