"""config.json of a saved model: its source, the changes, and the check against transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json as jsonlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.models import CheckpointError, Family

# Keys of the source file that must not be written: code beside the weights, which is not copied, and the
# packing of weights, which are written dense.
_DROPPED = {"auto_map", "quantization_config"}
_ROWS = 8192  # rows of a table that are compared at once
_LABELS = {"id2label", "label2id", "num_labels", "problem_type"}


def config_json(family: Family, config: Any, dtype: str, reward: bool = False) -> dict[str, Any]:
    """The config.json of a model: its source file, updated by the values that differ in `config`.

    Args:
        family: of the model.
        config: its config; if it has no `source`, every key is the codec's.
        dtype: of the params.
        reward: whether the model is written as a sequence classifier with one label.
    """
    codec = family.huggingface
    ours, source = codec.write(config), _source(family, config)
    if source:
        before = codec.write(codec.config(source))
        ours = {name: ours[name] for name in ours if before.get(name, ...) != ours[name]}
        source = codec.keys.with_floats(codec.keys.renamed(source)) if codec.keys else source
    kept = {name: source[name] for name in source if name not in _DROPPED}
    result = {"architectures": [codec.architecture], "model_type": family.name} | kept | ours
    result["architectures"] = [_architecture(codec.architecture, source)]
    if reward:
        base = re.sub("For.*|LMHeadModel|Model$", "", codec.architecture)
        result["architectures"] = [f"{base}ForSequenceClassification"]
        if len(source.get("id2label") or ()) != 1:
            result = {name: result[name] for name in result if name not in _LABELS}
            result |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return result | {"dtype": dtype, "torch_dtype": dtype}


def check_config(path: pathlib.Path, family: Family, config: Any) -> None:
    """Reads config.json again, with jaxft and, if installed, with transformers.

    Args:
        path: the directory.
        family: of the model that was saved.
        config: its config.

    Raises:
        CheckpointError: if either result describes another model.
    """
    file, codec = path / "config.json", family.huggingface
    json = jsonlib.loads(file.read_text())
    tensors = [entry.name for entry in codec.entries(config)]
    _compare(file, "jaxft", codec.config(json, tensors), config)
    if (view := _as_transformers(file, json)) is not None:
        _compare(file, "transformers", codec.config(view, tensors), config)


def check_tied(where: Any, family: Family, config: Any, tensors: Mapping[str, Any]) -> None:
    """Raises CheckpointError if config.json ties the embeddings to a different output projection.

    transformers keeps both in this case.
    """
    head = tensors.get("lm_head.weight")
    if head is None or not getattr(config, "tie_embeddings", False):
        return
    entries = family.huggingface.entries(config)
    (name,) = (entry.name for entry in entries if entry.paths == ("embed/embedding",))
    if (table := tensors.get(name)) is None:
        return
    if not _equal(head, table):
        raise CheckpointError(
            f"{where}: config.json ties the output projection to the embeddings, but lm_head.weight and "
            f"{name} differ; set tie_word_embeddings to false, or delete lm_head.weight."
        )


def renamed(where: Any, tensors: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The tensors of a file by `rename`; raises CheckpointError if two of one name differ."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        other = found.setdefault(rename(name), tensor)
        if other is not tensor and not _equal(other, tensor):
            raise CheckpointError(
                f"{where}: {name} differs from another tensor that is {rename(name)} too; jaxft's model has "
                "one for both. Use transformers for this model."
            )
    return found


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two tensors of a file are equal, reading a few rows at a time."""
    same = lambda i: np.array_equal(one[i : i + _ROWS], other[i : i + _ROWS])
    return one.shape == other.shape and all(map(same, range(0, len(one), _ROWS)))


def _as_transformers(file: pathlib.Path, json: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values that transformers' class reads from a config.json; None without transformers or a class."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import CONFIG_MAPPING

    kind = json["model_type"]
    # As in AutoConfig.
    kind = "ministral" if kind == "mistral" and "layer_types" in json else kind
    if kind not in CONFIG_MAPPING:
        return None
    # Reading the data type would import torch.
    plain = {name: json[name] for name in json if name not in ("dtype", "torch_dtype")}
    try:
        config = CONFIG_MAPPING[kind].from_dict(jsonlib.loads(jsonlib.dumps(plain)))
    except (
        Exception
    ) as error:  # Its validation has its own errors, and KeyError for missing numbers.
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: transformers cannot read it: {reason}") from error
    return config.to_dict() | {"model_type": json["model_type"]}


def _source(family: Family, config: Any) -> dict[str, Any]:
    source = jsonlib.loads(getattr(config, "source", "") or "{}")
    return source if source.get("model_type") == family.name else {}


def _architecture(ours: str, source: Mapping[str, Any]) -> str:
    """The class that the source names, if it has the same head as the written model."""
    (name, *_) = source.get("architectures") or [ours]
    head = re.search("ForCausalLM$|LMHeadModel$|(?<!LMHead)Model$", ours)
    return name if head and name.endswith(head[0]) else ours


def _compare(file: pathlib.Path, reader: str, read: Any, config: Any) -> None:
    """Raises CheckpointError with the fields in which two configs differ.

    The scale of attention may be given explicitly or follow from head_dim.
    """
    if hasattr(config, "attention_scale"):
        read, config = (dataclasses.replace(c, attention_scale=c.scale) for c in (read, config))
    names = [field.name for field in dataclasses.fields(config) if field.compare]
    pairs = [(name, getattr(read, name), getattr(config, name)) for name in names]
    told = [
        f"{name} is {found!r}, saved was {ours!r}" for name, found, ours in pairs if found != ours
    ]
    if told:
        raise CheckpointError(
            f"{file}: {reader} reads another model from it: {', '.join(told)}. Do not use it; the "
            "run's checkpoints hold the trained params."
        )
