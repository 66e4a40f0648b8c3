"""Model cards: the README.md of a model or adapter on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.checkpoints.packages import PACKAGES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(name: Any) -> str | None:
    """The hub id of a model or data set for its card; None if it is only on this disk."""
    name = str(name).split("?")[0]
    if name in PACKAGES:
        return PACKAGES[name].hub_id
    return name if _HUB_ID.fullmatch(name) and not pathlib.Path(name).exists() else None


def license_of(name: Any) -> str | None:
    """The license of a base model, if known: from its package, or from the card in its directory."""
    if str(name) in PACKAGES:
        return PACKAGES[str(name)].license
    card = pathlib.Path(str(name)) / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text(), re.DOTALL) if card.is_file() else None
    found = front and re.search(r"^license:\s*[\"']?([\w.-]+)", front[1], re.MULTILINE)
    return found[1] if found else None


def model_card(
    title: str,
    *,
    kind: str,
    base_model: str,
    data: Sequence[str],
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    command: str,
    commit: str | None = None,
    tags: Sequence[str] = (),
    classifier: bool = False,
) -> str:
    """The text of README.md: front matter in the hub's keys, the training setup, and how to load it.

    Keys: huggingface.co/docs/hub/model-cards. They only contain ids of the hub; the text names what is on a
    local disk. A license is written if it is known.

    Args:
        title: the heading.
        kind: "adapter" in PEFT's format, "native" for one in jaxft's own, or "model".
        base_model: the trained model, as an argument of load_model.
        data: sources of the training records.
        settings: name -> value of the run's other settings.
        metrics: name -> number; other values are left out.
        command: the training command.
        commit: of the code; None: not known.
        tags: besides "jaxft".
        classifier: whether the model returns scores rather than text.
    """
    base, license = hub_id(base_model), license_of(base_model)
    library = {"adapter": "peft", "native": "jaxft", "model": "transformers"}[kind]
    relation = "finetune" if kind == "model" else "adapter"
    front = {
        "base_model": base,
        "base_model_relation": base and relation,
        "library_name": library,
        "pipeline_tag": "text-classification" if classifier else "text-generation",
        "license": license,
        "datasets": [name for name in map(hub_id, data) if name],
        "tags": ["jaxft", *tags],
    }
    lines = ["---", *_yaml(front), "---", "", f"# {title}", ""]
    what = "Weights" if kind == "model" else "An adapter"
    lines += [f"{what} of `{_public(base_model)}`, fine-tuned with jaxft.", ""]
    lines += ["## Training", "", "| | |", "|---|---|"]
    lines += [f"| data | {', '.join(f'`{_cell(_public(name))}`' for name in data) or '-'} |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in settings.items()]
    lines += [f"| commit of the code | {commit or 'not known'} |", ""]
    lines += ["```", command, "```", ""]
    numbers = {n: x for n, x in metrics.items() if isinstance(x, int | float)}
    if numbers:
        lines += ["## Metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {_cell(name)} | {value:.6g} |" for name, value in numbers.items()]
        lines += [""]
    return "\n".join([*lines, "## Use", "", "```python", *_use(kind, base, classifier), "```", ""])


def write_card(path: str | os.PathLike, text: str) -> None:
    """Writes README.md in the directory."""
    (pathlib.Path(path) / "README.md").write_text(text)


def _yaml(front: Mapping[str, Any]) -> list[str]:
    """Lines of YAML; a JSON string is a YAML string. Empty values are left out."""
    lines = []
    for name, value in front.items():
        if isinstance(value, list) and value:
            lines += [f"{name}:", *(f"- {json.dumps(item)}" for item in value)]
        elif value:
            lines.append(f"{name}: {json.dumps(value)}")
    return lines


def _use(kind: str, base: str | None, classifier: bool) -> list[str]:
    auto = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    base = base or "path/to/the/base"
    if kind == "model":
        return [
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("path/to/this")',
        ]
    if kind == "native":
        return [
            "from jaxft import adapters, checkpoints",
            "",
            f'model, params = checkpoints.load_model("{base}")',
            'params = adapters.load_adapter("path/to/this", model.config, params)',
        ]
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "path/to/this")',
    ]


def _public(name: str) -> str:
    """The name without the directories of this machine."""
    return hub_id(name) or (pathlib.Path(name).name if name.startswith(("/", "~", ".")) else name)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
