"""Tasks of PaCA's script: a byte model fine-tuned from prose to program text, or a model from disk."""

from __future__ import annotations

import functools
import pathlib
import sysconfig
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import train
from jaxft.models import Decoder, DecoderConfig
from jaxft.objectives import supervised

# `config` is the Config of experiments/papers/paca/main.py.


class Task(NamedTuple):
    """A pretrained model and its fine-tuning data."""

    model: Decoder
    params: Any
    batches: Callable[[int], Iterable]  # seed -> batches
    validation: list[Any]
    test: list[Any]
    mesh: Any = None


def small_task(config) -> Task:
    """A byte model pretrained on prose, to be fine-tuned on program text."""
    prose, code = language_reference(), library_sources()
    settings = DecoderConfig(
        256, 128, 352, num_layers=config.layers, num_heads=4, num_kv_heads=4, head_dim=32,
        max_length=config.length,
    )  # fmt: skip
    model = Decoder(settings, scan_layers=True)
    params = jax.jit(model.init)(jax.random.key(0), model.example_input())["params"]
    draw = functools.partial(random_rows, config=config)
    optimizer = train.make_optimizer(3e-3, total_steps=config.pretrain_steps)
    state, history = train.fit(
        params, supervised(model.forward), optimizer, draw(prose, 0), steps=config.pretrain_steps
    )
    print(f"pretrained: loss {history[-1]['loss']:.3f} nats a byte")
    rows = functools.partial(even_rows, config=config)
    batches = functools.partial(draw, code["train"])
    return Task(model, state.params, batches, rows(code["validation"]), rows(code["test"]))


def language_reference() -> bytes:
    """The Python language reference as Python itself carries it: 0.7 MB of technical English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def library_sources() -> dict[str, bytes]:
    """The modules of Python's standard library; whole files go to one split each."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    part = lambda i: {8: "validation", 9: "test"}.get(i % 10, "train")
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for i, file in enumerate(files):
        splits[part(i)].append(file.read_bytes())
    return {name: b"\n".join(texts) for name, texts in splits.items()}


def random_rows(text: bytes, seed: int, *, config) -> Iterable[dict[str, np.ndarray]]:
    """Endless batches of rows from anywhere in the text."""
    rng, array = np.random.default_rng(seed), np.frombuffer(text, np.uint8)
    while True:
        starts = rng.integers(0, len(array) - config.length, (config.batch_size, 1))
        yield {"tokens": array[starts + np.arange(config.length)].astype(np.int32)}


def even_rows(text: bytes, *, config, rows: int = 256) -> list[dict[str, np.ndarray]]:
    """`rows` rows evenly over the text, in batches."""
    array, rows = np.frombuffer(text, np.uint8), 16 if config.smoke else rows
    starts = np.linspace(0, len(array) - config.length, rows).astype(int)[:, None]
    tokens = array[starts + np.arange(config.length)].astype(np.int32)
    return [{"tokens": part} for part in np.split(tokens, len(tokens) // 16)]


def pretrained_task(config) -> Task:
    """A model from disk or the hub, and records."""
    from jaxft import checkpoints, data
    from jaxft.parallel import make_mesh

    mesh = make_mesh(fsdp=-1) if jax.device_count() > 1 else None
    model, params = checkpoints.load_model(config.model, mesh=mesh, scan_layers=mesh is not None)
    if config.preset == "full":
        model = model.clone(dtype=jnp.bfloat16, remat="lean")
    renderer = data.Renderer(checkpoints.load_tokenizer(config.model))
    sized = {"batch_size": config.batch_size, "max_length": config.length}
    render = lambda records: data.render(records, renderer, config.length, too_long="truncate")
    training, held_out = render(data.load(config.data)), render(data.load(config.eval_data))
    return Task(
        model,
        params,
        lambda seed: data.batches(training, seed=seed, **sized),
        data.finite_batches(held_out[::2], **sized),
        data.finite_batches(held_out[1::2], **sized),
        mesh,
    )
