"""Model cards for the saved results of a run, and --push-to-hub."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from experiments.cli import choices, flags
from jaxft import checkpoints as files
from jaxft.models.json_files import read_json
from jaxft.parallel import written_once

ROOT = pathlib.Path(__file__).parents[2]
# Flags shown elsewhere in the card, or specific to this machine.
_LEFT_OUT = {
    "model",
    "data",
    "output_dir",
    "public",
    "push_to_hub",
    "resume",
    "debug",
    "report_to",
    "profile_dir",
}


def check(config: Any) -> None:
    """Checks that --push-to-hub can work, before any training."""
    if repo := flags.flat(config).get("push_to_hub"):
        files.check_push(repo)


def publish(config: Any, metrics: Mapping[str, Any], output: pathlib.Path) -> Any:
    """Writes the model card, pushes to the hub if --push-to-hub is set, and returns the metrics.

    The saved files are in `output`, or in its folder "adapter" or "model".
    """
    # Other hosts may not see the first host's disk.
    written_once(lambda: _publish(config, metrics, output), str(output))
    return metrics


def _publish(config: Any, metrics: Mapping[str, Any], output: pathlib.Path) -> None:
    found = [place for place in (output / "adapter", output / "model", output) if _kind(place)]
    if not found:
        return
    files.write_card(found[0], card_of(config, metrics, found[0]))
    values = flags.flat(config)
    if values["push_to_hub"]:
        repo, private = files.check_push(values["push_to_hub"]), not values["public"]
        address = files.push(found[0], repo, private=private, message=command(config))
        print(f"pushed to {address}")


def card_of(config: Any, metrics: Mapping[str, Any], path: pathlib.Path) -> str:
    """Returns the card of a directory that a script wrote."""
    values = flags.flat(config)
    sources = values.get("data") or ()
    settings = {"adapter": _public(values["adapter"])} if "adapter" in values else {}
    settings |= {n: _public(x) for n, x in _given(config).items() if n not in _LEFT_OUT}
    kind, classifier, tags = _kind(path)
    return files.model_card(
        f"{path.parent.name}-{path.name}",
        kind=kind,
        base_model=values["model"],
        data=[sources] if isinstance(sources, str) else list(sources),
        settings=settings,
        metrics=metrics,
        command=command(config),
        commit=commit(),
        tags=tags,
        classifier=classifier,
    )


def command(config: Any) -> str:
    """Returns the given flags as typed, with local paths shortened to their last part."""
    module = sys.modules[type(config).__module__]
    script = pathlib.Path(getattr(module, "__file__", None) or "script.py").resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    shown = [_typed(flag, _public(value)) for flag, value in _given(config).items()]
    return " ".join(["python", str(name), *shown])


def _typed(flag: str, value: Any) -> str:
    """Formats a flag for a shell."""
    if isinstance(value, bool):
        return choices.option(flag if value else f"no_{flag}")
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([choices.option(flag), *(shlex.quote(str(x)) for x in values)])


def commit() -> str | None:
    """Returns the commit of the running code, with "+" if files are changed; None without a checkout."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _given(config: Any) -> dict[str, Any]:
    """{flag: value} of flags that differ from the script's defaults or have none."""
    absent = dataclasses.MISSING
    fields = [f for f in dataclasses.fields(config) if f.default is f.default_factory is absent]
    needed = {field.name: getattr(config, field.name) for field in fields}
    default = flags.flat(type(config)(**needed))
    found = flags.flat(config).items()
    return {name: x for name, x in found if name in needed or x != default[name]}


def _public(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_public, value))
    is_path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return pathlib.Path(value).name if is_path else value


def _kind(path: pathlib.Path) -> tuple[str, bool, list[str]] | None:
    """Returns (kind of model_card, whether it is a classifier, tags); None for a directory without model."""
    if (file := path / "adapter_config.json").exists():
        found = read_json(file)
        tags = [found["peft_type"].lower()] if "peft_type" in found else []
        return "adapter", found.get("task_type") == "SEQ_CLS", tags
    if (file := path / "config.json").exists():
        names = read_json(file).get("architectures") or [""]
        return "model", names[0].endswith("ForSequenceClassification"), []
    return ("native", False, []) if (path / "jaxft_adapter.json").exists() else None
