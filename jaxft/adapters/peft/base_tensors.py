"""Tensors of the base model in an adapter's file: PEFT saves adapted or resized embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Tensors
from jaxft.adapters.peft.model import PREFIX, Model
from jaxft.models import Entry
from jaxft.models.transformer import EMBEDDING
from jaxft.parallel import to_host
from jaxft.weights import is_weight, to_dense

# The leaves that a resized vocabulary changes.
VOCABULARY = (EMBEDDING, "head/kernel")
# The vocabulary axis of a tensor of the embeddings or of the output projection.
_AXES = {
    "weight": 0,
    "bias": 0,
    "base_layer.weight": 0,
    "lora_B.weight": 0,
    "lora_embedding_A": 1,
}


def check_vocabulary(tensors: Tensors, model: Model) -> None:
    """Raises AdapterError if the adapter was trained with a vocabulary of another size."""
    embedding = next((m for m in model.embeddings if EMBEDDING in m.paths), None)
    if embedding is None:
        return
    for module in (embedding.name, model.head):
        for suffix, axis in _AXES.items():
            tensor = tensors.get(f"{PREFIX}{module}.{suffix}")
            if module == embedding.name and suffix in ("bias", "lora_B.weight"):
                continue
            if tensor is not None and tensor.ndim > axis and tensor.shape[axis] != embedding.inputs:
                size = tensor.shape[axis]
                raise AdapterError(
                    f"the adapter has a vocabulary of {size} tokens ({module}), the model one of "
                    f"{embedding.inputs}. Resize the base model as before training (in transformers: "
                    f"resize_token_embeddings({size}), save_pretrained), and load the adapter onto that."
                )


def read_base(tensors: Tensors, model: Model) -> dict[str, jax.Array]:
    """path -> leaf of the base model that differs in the file; removes base tensors from `tensors`.

    PEFT writes such tensors only for the embeddings and the output projection, and loads them into the
    base model.

    Raises:
        AdapterError: if another tensor of the base model differs from this model's.
    """
    found = {}
    for module, leaves in model.leaves.items():
        for leaf, entry in leaves.items():
            for key in (f"{PREFIX}{module}.base_layer.{leaf}", f"{PREFIX}{module}.{leaf}"):
                if key in tensors:
                    found |= _other(key, tensors.pop(key), entry, model)
    return found


def _other(key, tensor, entry: Entry, model: Model) -> dict[str, jax.Array]:
    """{} for a tensor equal to the model's; {path: leaf} for other embeddings."""
    leaf = tensor.T if entry.transposed else tensor
    nodes = [model.nodes[path] for path in entry.paths]
    own = np.concatenate([to_host(to_dense(node)) for node in nodes], -1)
    if entry.paths[0] in VOCABULARY and leaf.shape == own.shape:
        return {} if _equal(leaf, own) else {entry.paths[0]: jnp.asarray(leaf)}
    if leaf.shape != own.shape or not (_equal(leaf, own) or _is_rounded(leaf, own, nodes)):
        cause = "the adapter was trained on another model"
        if key.endswith("bias"):
            cause = "it trained with an option `bias` other than in adapter_config.json, or on another model"
        raise AdapterError(
            f"{key!r} is a tensor of the base model, but differs from this model's: {cause}."
        )
    return {}


def take_tied(tensors: Tensors, model: Model, embedding: np.ndarray) -> None:
    """Removes the output projection from the file's tensors if the model ties it to its embeddings.

    PEFT writes it if both are saved or adapted together.

    Args:
        tensors: `<head>.weight` and `<head>.base_layer.weight` are removed.
        model: with tied embeddings.
        embedding: [V, D], after all changes that the file makes.

    Raises:
        AdapterError: if the projection is not equal to `embedding`.
    """
    for suffix in ("weight", "base_layer.weight"):
        tensor = tensors.pop(f"{PREFIX}{model.head}.{suffix}", None)
        if tensor is not None and not _equal(tensor, embedding):
            raise AdapterError(untied(model, f"{model.head}.{suffix} is not the embedding"))


def untied(model: Model, what: str) -> str:
    """The message for an adapter that unties the output projection from the embeddings."""
    return (
        f"{what}, but this model has its output projection ({model.head}) tied to its embeddings, and keeps "
        "one array. Train with ensure_weight_tying, or untie the base first (in transformers: clone "
        "lm_head.weight, set config.tie_word_embeddings = False, save_pretrained) and load onto that."
    )


def _equal(leaf, own) -> bool:
    """Equal up to the rounding of the coarser data type."""
    if leaf.shape != own.shape:
        return False
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (leaf, own))
    own = own.astype(np.float32)
    return bool(np.all(np.abs(leaf.astype(np.float32) - own) <= eps * np.abs(own)))


def _is_rounded(leaf, own, nodes) -> bool:
    """Returns whether `own` is a quantised form of `leaf`."""
    error = np.linalg.norm(leaf.astype(np.float32) - own.astype(np.float32))
    return any(map(is_weight, nodes)) and bool(error <= 0.2 * np.linalg.norm(own))
