"""Names what a directory holds if it is not a model, or if it has another head than jaxft reads."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxft.models import CheckpointError, Family
from jaxft.models.json_files import read_json

ADAPTER = "adapter_config.json"  # of PEFT
SCORE = "score.weight"  # of a sequence classifier


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The config.json of a directory that holds a model and no adapter.

    transformers loads a directory with both as the adapter's base with the adapter, not as the model.

    Raises:
        CheckpointError: if there is none, or it is damaged; or if there is an adapter.
    """
    file, adapter = path / "config.json", (path / ADAPTER).exists()
    if adapter and file.exists():
        raise CheckpointError(
            f"{path}: holds a model (config.json) and an adapter ({ADAPTER}), which transformers would load "
            "instead; move one of them elsewhere."
        )
    if adapter:
        base = read_json(path / ADAPTER).get("base_model_name_or_path")
        raise CheckpointError(
            f"{path}: an adapter, not a model; give its base ({base or 'not named in it'}) as the model, and "
            "this directory as the adapter."
        )
    if not file.exists():
        raise CheckpointError(f"{path}: no config.json; is it a Hugging Face model directory?")
    return read_json(file)


def refuse_adapter_beside(path: pathlib.Path) -> None:
    """Raises CheckpointError for an output directory with an adapter: see `read_config`."""
    if (path / ADAPTER).exists():
        raise CheckpointError(
            f"{path}: holds an adapter ({ADAPTER}), which transformers would load instead of a model saved "
            "there; choose another directory."
        )


def check_head(
    path: pathlib.Path,
    family: Family,
    config: Any,
    json: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> None:
    """Checks that the files hold the output projection, and a classifier only of one label.

    Args:
        path: the directory.
        family: of the model.
        config: of the model.
        json: its config.json.
        tensors: name -> tensor of its files.

    Raises:
        CheckpointError: for a model of another class, named by `architectures`.
    """
    kind = ", ".join(map(str, json.get("architectures") or [])) or "a model of another class"
    labels = tensors[SCORE].shape[0] if SCORE in tensors else 1
    if labels != 1 or "score.bias" in tensors:
        raise CheckpointError(
            f"{path}: {kind} has a classifier of {labels} label{'s' * (labels != 1)}"
            f"{' with a bias' * ('score.bias' in tensors)}; jaxft reads models of language, and classifiers "
            "of sequences with one label (reward models)."
        )
    head = f"{family.huggingface.head}.weight"
    expected = {entry.name for entry in family.huggingface.entries(config)}
    if head in tensors or head not in expected or len(expected & tensors.keys()) < 2:
        return
    why = (
        "load the checkpoint that has it or, if the embeddings are its output projection, set "
        "tie_word_embeddings to true in its config.json"
    )
    raise CheckpointError(f"{path}: {kind} was saved without output projection ({head}); {why}.")
