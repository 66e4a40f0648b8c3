"""The files that sentence-transformers has beside a model: modules, pooling, lengths, prompts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxft.models import CheckpointError, Pooling
from jaxft.models.json_files import read_json
from jaxft.models.sentences import POOLINGS

# Their names in 1_Pooling/config.json up to version 5; newer versions read them too.
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Settings of the module Transformer; the first that is there counts.
_OWN = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_KINDS = ("Transformer", "Pooling", "Normalize")


@dataclasses.dataclass(frozen=True)
class SentenceSettings:
    """The settings of a model in sentence-transformers' files.

    Attributes:
        pooling: of the hidden states.
        max_length: tokens of a text, special ones included; None: the tokenizer's.
        prompts: name -> text put before a text: {"query": "query: ", "document": "passage: "}.
        similarity: "cosine" or "dot".
    """

    pooling: Pooling = Pooling()
    max_length: int | None = None
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    similarity: str = "cosine"

    def prompt(self, *names: str) -> str:
        """The first of the named prompts that is there; "" without one."""
        return next((self.prompts[name] for name in names if name in self.prompts), "")


def read_sentence_settings(path: pathlib.Path) -> SentenceSettings:
    """Reads modules.json and the files that it names; a directory without it has the defaults.

    Raises:
        CheckpointError: for modules that jaxft does not compute, such as Dense.
    """
    path = pathlib.Path(path)
    if not (path / "modules.json").is_file():
        return SentenceSettings()
    modules = json.loads((path / "modules.json").read_text("utf-8"))
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{path / 'modules.json'}: the modules are {', '.join(kinds)}; expected Transformer, Pooling "
            "and, if there is one, Normalize. Use sentence-transformers for this model."
        )
    at = {kind: path / module["path"] for kind, module in zip(kinds, modules, strict=True)}
    files = [at["Transformer"] / name for name in _OWN]
    file = next((file for file in files if file.is_file()), files[0])
    own = _optional(file)
    # As in sentence-transformers, lower case is the tokenizer's if it is not asked for here.
    if own.get("do_lower_case"):
        raise CheckpointError(
            f"{file}: do_lower_case is true, which jaxft "
            "leaves to the tokenizer; set it to false if the tokenizer already makes lower case."
        )
    more = _optional(path / "config_sentence_transformers.json")
    if default := more.get("default_prompt_name"):
        raise CheckpointError(
            f"{path / 'config_sentence_transformers.json'}: default_prompt_name is {default!r}; expected "
            "none: jaxft's queries take the prompt 'query' and its passages 'document' or 'passage'."
        )
    pooling = _pooling(at["Pooling"] / "config.json", "Normalize" in kinds)
    similarity = more.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise CheckpointError(
            f"{path / 'config_sentence_transformers.json'}: similarity_fn_name is {similarity!r}; expected "
            "cosine or dot."
        )
    return SentenceSettings(
        pooling, own.get("max_seq_length"), more.get("prompts") or {}, similarity
    )


def write_sentence_settings(path: pathlib.Path, settings: SentenceSettings, width: int) -> None:
    """Writes modules.json and the files that it names beside a saved model.

    Args:
        path: the model's directory.
        settings: what to write.
        width: features of a hidden state.
    """
    path = pathlib.Path(path)
    kinds = _KINDS if settings.pooling.normalize else _KINDS[:2]
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": places[kind],
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    flags = {flag: mode in settings.pooling.modes for mode, flag in _FLAGS.items()}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_length,
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "prompts": dict(settings.prompts),
            "default_prompt_name": None,
            "similarity_fn_name": settings.similarity,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **flags,
            "include_prompt": True,
        },
    }
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if settings.pooling.normalize:
        (path / "2_Normalize").mkdir(exist_ok=True)


def _pooling(file: pathlib.Path, normalize: bool) -> Pooling:
    found = _optional(file)
    modes = found.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, flag in _FLAGS.items() if found.get(flag)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    # sentence-transformers puts several side by side in the order of its own list.
    order = list(_FLAGS)
    if set(modes) <= POOLINGS.keys():
        modes = tuple(sorted(modes, key=order.index))
    if not found.get("include_prompt", True):
        raise CheckpointError(f"{file}: include_prompt is false, which jaxft does not compute.")
    try:
        return Pooling(modes, normalize)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _optional(file: pathlib.Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
