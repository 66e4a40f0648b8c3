"""The language-model part of tram.py: fine-tuned on one domain of real text, judged on others."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers.tram.methods import Task, train_together
from jaxft.models import Decoder
from jaxft.models.config import tiny_config
from jaxft.objectives import shift, token_logits

HELD_OUT = 128  # rows of each split


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the text part."""

    seeds: int
    pretrain_steps: int
    steps: int
    batch_size: int
    length: int  # tokens of a row
    layers: int  # layers of the small model
    model: str | None  # replaces the small model
    lora: bool  # LoRA of that model, else all params train
    texts: str | None  # folder with <domain>.txt; None: installed texts
    domain: str  # the training domain


def small_tasks(settings: Settings, options: dict | None = None) -> list[Task]:
    """A byte model for each seed, pretrained on Python's standard library; Adam's best steps at 3e-3."""
    encode = lambda text: np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    small = dict(hidden_size=64, intermediate_size=128, head_dim=16, num_layers=settings.layers)
    model = Decoder(dataclasses.replace(tiny_config(128), **small))
    code = _pieces(encode(library_sources()), settings.length)
    init = jax.jit(model.init)
    tasks = [_task(settings, model, None, encode, seed) for seed in range(settings.seeds)]

    def before(seed, task):
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, len(code), (settings.pretrain_steps, settings.batch_size))
        params = init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        return task._replace(params=params, training={"tokens": code}, rows=rows)

    params, _ = train_together("Adam", [before(*pair) for pair in enumerate(tasks)], options)(3e-3)
    return [task._replace(params=p) for task, p in zip(tasks, params, strict=True)]


def large_task(settings: Settings, seed: int, mesh: Any) -> Task:
    """A pretrained model with LoRA on all projections, or as it is."""
    from jaxft.adapters import ALL_LINEAR, apply_named, float32_masters
    from jaxft.checkpoints import load_model, load_tokenizer

    model, params = load_model(settings.model, mesh=mesh)
    if settings.lora:
        params = apply_named(
            params, "lora", rank=8, alpha=16.0, target=ALL_LINEAR, quantise=None, seed=seed
        )
    params = float32_masters(params)
    tokenizer = load_tokenizer(settings.model)
    encode = lambda text: np.array(tokenizer(text)["input_ids"])
    return _task(settings, model, params, encode, seed)


def _task(settings: Settings, model: Decoder, params: Any, encode: Callable, seed: int) -> Task:
    texts = domains(settings)
    rng = np.random.default_rng(1000 + seed)
    training = _pieces(encode(texts.pop("training")), settings.length)
    even = lambda rows: rows[np.linspace(0, len(rows) - 1, HELD_OUT).astype(int)]
    splits = {name: _pieces(encode(text), settings.length) for name, text in texts.items()}
    return Task(
        token_logits(model.forward),
        lambda batch: shift(batch)[0],
        params,
        {"tokens": training},
        rng.integers(0, len(training), (settings.steps, settings.batch_size)),
        {name: {"tokens": even(rows)} for name, rows in splits.items()},
    )


def domains(settings: Settings) -> dict[str, str]:
    """Texts: "training", "validation", "in domain" (whole sections apart), and the other domains."""
    if settings.texts:
        files = sorted(pathlib.Path(settings.texts).glob("*.txt"))
        found = {file.stem: file.read_text() for file in files}
        if settings.domain not in found or len(found) < 2:
            raise ValueError(
                f"texts: {settings.texts} must hold {settings.domain}.txt and a .txt of another domain, "
                f"found {sorted(found)}."
            )
        sections = found.pop(settings.domain).split("\n\n")
    else:
        sections, found = language_reference(), installed_prose()
    part = lambda *digits: "\n\n".join(s for i, s in enumerate(sections) if i % 10 in digits)
    own = {"training": part(*range(8)), "validation": part(8), "in domain": part(9)}
    return own | found


def language_reference() -> list[str]:
    """The sections of the Python language reference, which Python itself carries: technical English."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def installed_prose() -> dict[str, str]:
    """Three domains of English that this script's own requirements bring along."""
    join = lambda paths: "\n\n".join(path.read_text(errors="replace") for path in paths)
    resources = importlib.resources.files
    described = resources("sklearn.datasets") / "descr"
    tales = resources("reasoning_gym") / "data" / "in_the_year_2889.txt"
    licences = [
        pathlib.Path(file.locate())
        for package in ("numpy", "scipy")
        for file in importlib.metadata.files(package) or []
        if file.name.startswith("LICENSE")
    ]
    names = sorted(described.iterdir(), key=lambda path: path.name)
    return {
        "data sets": join(path for path in names if path.name.endswith(".rst")),
        "a tale": join([tales]),
        "licences": join(licences),
    }


def library_sources() -> str:
    """1 MB of modules of Python's standard library, code and docstrings."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(errors="replace") for file in files)[:1_000_000]


def _pieces(tokens, length):
    rows = len(tokens) // length
    if not rows:
        raise ValueError(f"a text of {len(tokens)} tokens is too short for rows of {length}.")
    return tokens[: rows * length].reshape(rows, length).astype(np.int32)
