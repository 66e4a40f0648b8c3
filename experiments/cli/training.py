"""What the scripts that train share: flags, mesh, adapters, optimizer, callbacks, saving.

The functions read the flags that they name, of a `Run` or a `Training`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.cli.optimizers import OPTIMIZERS, Optimizer, Sharpness
from jaxft import checkpoints as files
from jaxft import data, train
from jaxft.adapters import (
    AdapterError,
    Name,
    Quantisation,
    adapter_tensors,
    apply_named,
    count,
    rounding_loss,
    save_checked,
)
from jaxft.data.batching import MIN_BUCKET
from jaxft.models import family_of
from jaxft.models.remat import Remat
from jaxft.parallel import connect_hosts, make_mesh, shard_params, written_once

# Where --report-to sends the metrics of all steps.
LOGS = {
    "tensorboard": lambda config, output: train.tensorboard_log(output / "tensorboard"),
    "wandb": lambda config, output: train.wandb_log(
        "jaxft", name=output.name, config=dataclasses.asdict(config)
    ),
}
Log = Literal[tuple(LOGS)]


@dataclasses.dataclass(frozen=True)
class Run:
    """Flags of every script that trains a language model."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id

    adapter: Name = "lora"  # what trains; full: everything
    quantise: Quantisation | None = None  # round the frozen kernels (nf4: QLoRA, QPaCA, QDoRA)
    rank: int = 16
    alpha: float = 32.0  # over rank: LoRA's scale; for paca a factor of the learning rate
    target: str = "all-linear"  # or a pattern of the paths of adapted kernels

    max_steps: int = 60
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    optimizer: Optimizer = (
        "adamw"  # lion: learning rate 3 to 10 times smaller, decay as much larger
    )
    sharpness: Sharpness = (
        "none"  # sam... : flatter minima for about twice the time (look_sam: 1.2 times)
    )
    rho: float | None = None  # its radius; default: the method's own
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    template: str | None = (
        None  # chat template that replaces the model's: a file, or chatml, llama3, gemma...
    )

    data_axis: int = 1  # mesh: copies of the model; -1 fills
    fsdp: int = 1  # mesh: shards of the params and the batch; -1 fills
    tensor: int = 1  # mesh: shards of each projection
    context: int = 1  # mesh: shards of each row's tokens, for rows too long for one device
    slices: int | None = (
        None  # groups of devices that share a fast network, each with whole copies; TPU slices are found
    )
    distributed: bool = (
        False  # one of several hosts (Cloud TPU slices, Kubernetes); see TPU_SETUP.md
    )
    bfloat16: bool = False  # compute in bfloat16; what trains stays float32
    scan_layers: bool = False  # stack layers: compile time independent of depth
    remat: Remat = "none"  # recompute in the backward pass: lean, dots or full save memory

    save_steps: int = 100
    logging_steps: int = 5
    report_to: tuple[Log, ...] = ()
    profile_dir: str | None = None  # trace of a few steps
    resume: bool = False
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


@dataclasses.dataclass(frozen=True)
class Training(Run):
    """Flags of scripts that train on rows of records."""

    validation: float = 0.05  # the part held out, if there is no eval_data
    batch_size: int = 2  # rows of one step, over all devices and accumulation steps
    max_length: int = 384  # tokens of a row
    max_bad: float = 0.0  # largest share of unusable records that is skipped rather than an error
    eval_steps: int = 20
    preview: bool = False  # print examples with what trains marked, then stop


def start(config: Run) -> None:
    """Joins the other hosts, if there are any: the first alone prints. Keeps malloc's memory."""
    connect_hosts(config.distributed)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    train.keep_memory_warm()


def write_metrics(output: pathlib.Path, metrics: Mapping[str, Any]) -> None:
    """metrics.json, and a line that says where it lies."""
    text = json.dumps(metrics, indent=2) + "\n"
    written_once(lambda: (output / "metrics.json").write_text(text), str(output))
    print(f"metrics and figure in {output}")


def make_optimizer(config: Run) -> optax.GradientTransformation:
    """The optimizer that the flags ask for."""
    return train.make_optimizer(
        config.learning_rate,
        total_steps=config.max_steps,
        schedule=getattr(train, config.schedule),
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        rule=OPTIMIZERS[config.optimizer](),
    )


def load_base(
    config: Run,
    mesh: Any,
    check: Callable[[Any, Any], None] | None = None,
    *,
    keeps_start: bool = False,
) -> tuple[Any, Any]:
    """(model, base params) on the mesh, in the types that the flags ask for.

    Args:
        check: of (config, model), what must hold before minutes are spent; None: `check_length`.
        keeps_start: whether training needs the base beside what trains, as a reference model.

    Raises:
        ValueError: if they cannot fit the memory there is.
    """
    opened = files.open_model(config.model)
    shapes = files.model_shapes(opened, scan_layers=config.scan_layers)
    trains_all = make_optimizer(config) if config.adapter == "full" else None
    devices = [jax.devices()[0]] if mesh is None else list(mesh.local_devices)
    needed = train.state_bytes(shapes, trains_all, mesh)
    if keeps_start and config.adapter == "full":  # Adapters share the frozen base.
        needed["reference"] = needed["weights"]
    train.check_memory(
        needed,
        devices,
        "take --adapter lora rather than full, more shards (--fsdp, --tensor) or a smaller model; "
        "`python -m jaxft.compile` tells what a slice would need.",
    )
    model, base = files.load_model(opened, mesh=mesh, scan_layers=config.scan_layers)
    model = model.clone(dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32, remat=config.remat)
    (check or check_length)(config, model)
    return model, base


def adapt_params(config: Run, model: Any, base: Any, mesh: Any) -> Any:
    """The base params of a model with what trains: adapters, or all of them."""
    family = family_of(model.config)
    settings = adapter_settings(config)
    params = apply_named(
        base, config.adapter, targets=family.targets, stacked=family.stacked_axes, **settings
    )
    if mesh is not None:
        params = shard_params(params, mesh, family.rules, family.layers)
    return announce(params)


def announce(params: Any) -> Any:
    """The params, having said how many of them train."""
    trains, total = count(params)
    print(f"{trains:,} of {total:,} parameters train ({trains / total:.2%})")
    return params


def checkpoints(config: Run, output: pathlib.Path, best: str | None = None) -> train.Checkpoints:
    """Where and when to save."""
    path = output / "checkpoints"
    return train.Checkpoints(path, every=config.save_steps, best=best, resume=config.resume)


def callbacks(
    config: Training, objective: Any, eval_batches: Any, output: pathlib.Path, mesh: Any
) -> list[train.Callback]:
    """Evaluation, progress, logs and the figure of a run."""
    title = f"{config.model}, {config.adapter}"
    return [
        train.evaluation(objective, eval_batches, steps=config.eval_steps, mesh=mesh),
        train.progress(steps=config.logging_steps),
        train.run_figure(output / "training.png", title=title),
        *logs(config, output),
    ]


def logs(config: Run, output: pathlib.Path) -> list[train.Callback]:
    """Where the metrics of all steps go, and a profile if the flags ask for one."""
    result = [train.jsonl_log(output / "metrics.jsonl")]
    result += [LOGS[name](config, output) for name in config.report_to]
    if config.profile_dir:
        result.append(train.profile(config.profile_dir))
    return result


def save(
    config: Run,
    model: Any,
    params: Any,
    base: Any,
    mesh: Any,
    output: pathlib.Path,
    *,
    whole: bool = False,
) -> None:
    """What trained, read again and compared: PEFT's files, jaxft's own, or (`whole`) the model."""
    if whole or config.adapter == "full":
        path = output / "model"
        difference = files.save_merged(path, model, params, tokenizer_from=config.model, mesh=mesh)
        print(f"model saved to {path}; read again: {difference}")
        return
    path, native = output / "adapter", None
    try:
        adapter_tensors(model.config, params)
    except AdapterError as error:
        print(f"jaxft's own format: {error}")
        native = {"name": config.adapter, **adapter_settings(config)}
    difference = save_checked(path, model, params, base, base_model=config.model, native=native)
    print(f"adapter saved to {path}; read again: {difference}")
    if (lost := rounding_loss(params, base)) is not None:
        print(
            f"{config.quantise} took up to {lost:.1%} of a kernel, and the adapter trained with that; "
            "PEFT's files do not say so: quantise the base alike where you use it."
        )


def adapter_settings(config: Run) -> dict[str, Any]:
    """The arguments of `apply_named` in the flags."""
    names = ("rank", "alpha", "target", "quantise", "seed")
    return {name: getattr(config, name) for name in names}


def mesh_of(config: Run) -> Any:
    """The mesh that the flags ask for; None on one device."""
    names = {"data": "data_axis", "fsdp": "fsdp", "tensor": "tensor", "context": "context"}
    sizes = {axis: getattr(config, name) for axis, name in names.items()}
    if set(sizes.values()) != {1}:
        return make_mesh(**sizes, slices=config.slices)
    if jax.device_count() == 1:
        return None
    return make_mesh(devices=jax.devices()[:1]) if jax.process_count() == 1 else make_mesh()


def check_output(config: Run, output: pathlib.Path) -> None:
    """Before the model is loaded: fit itself would find out minutes later."""
    train.writable_directory(output)
    if not config.resume and any((output / "checkpoints").glob("[0-9]*")):
        raise train.OutputError(
            f"{output} holds an earlier run; go on with --resume, or choose another --output-dir."
        )


def check_length(config: Training, model: Any) -> None:
    """Whether the model has the positions, and the batch can be split."""
    if config.max_length > model.config.max_length:
        raise ValueError(
            f"--max-length {config.max_length} is more than the {model.config.max_length} positions "
            f"of {config.model}."
        )
    if config.context < 1 or config.max_length % config.context or MIN_BUCKET % config.context:
        raise ValueError(
            f"--context {config.context} must divide --max-length {config.max_length} and {MIN_BUCKET}, "
            "the length of the shortest rows."
        )
    parts = config.gradient_accumulation_steps * jax.process_count()
    if parts < 1 or config.batch_size < 1 or config.batch_size % parts:
        raise ValueError(
            f"--batch-size {config.batch_size} must be a positive multiple of --gradient-accumulation-steps "
            f"({config.gradient_accumulation_steps}) times the {jax.process_count()} processes."
        )


def with_small(config: Any, small: Mapping[str, Any]) -> Any:
    """The config with `small` in place of what is at its default."""
    default = type(config)()
    keep = {name for name in small if getattr(config, name) != getattr(default, name)}
    return dataclasses.replace(config, **{n: v for n, v in small.items() if n not in keep})


def question(record: Mapping[str, Any], messages: Any) -> str:
    """What a record asks: its user turns, its prompt or its text."""
    if messages is None:
        return record.get("prompt") or record.get("text") or str(record.get("tokens"))
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


def without_known(held_out: list, known: set[str], ask: Any) -> list:
    """The held-out records whose question is not among `known`: those would measure memory.

    Raises:
        DataError: if none is left.
    """
    left = [record for record in held_out if ask(record) not in known]
    if not left:
        raise data.DataError("every held-out record is also in the training data.")
    return left
