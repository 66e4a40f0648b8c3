"""What the main functions of the scripts that train share, in the order in which they call it.

`config` is a script's: it has the groups base, kernels, optimisation, mesh and output of `flags`, and the
flags adapter, seed and smoke; where rows of records are read, also the group rows and eval_data.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.cli import cards, choices, flags
from experiments.cli.models import check_positions
from experiments.cli.optimizers import OPTIMIZERS, SHARPNESS, Sharpened, sharpen
from jaxft import checkpoints as files
from jaxft import data, train
from jaxft.adapters import (
    AdapterError,
    adapter_tensors,
    apply_named,
    count,
    rounding_loss,
    save_checked,
)
from jaxft.data.batching import MIN_BUCKET
from jaxft.models import Forward, family_of
from jaxft.objectives import Objective
from jaxft.parallel import connect_hosts, make_mesh, shard_params, written_once

# reasoning-gym draws entry i from seed + i: seeds of parts must lie further apart than their sizes.
NEEDLE = "rg:needle_haystack?min_num_statements=4&max_num_statements=8"
# What every --smoke takes.
TINY = {"model": "tiny", "rank": 2, "alpha": 4.0}


def start(config: Any, small: Mapping[str, Any]) -> Any:
    """The config, of which --smoke takes `small`; joins the other hosts, of which the first alone prints."""
    config = flags.with_small(config, TINY | small) if config.smoke else config
    choices.check(config, "sharpness", SHARPNESS)
    connect_hosts(config.mesh.distributed)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    train.keep_memory_warm()
    return config


def place(config: Any) -> tuple[pathlib.Path, Any]:
    """(output directory, mesh); fit itself would find out minutes later that it cannot be written to.

    The mesh is None on one device.
    """
    cards.check(config)
    output = pathlib.Path(config.output.output_dir)
    train.writable_directory(output)
    if not config.output.resume and any((output / "checkpoints").glob("[0-9]*")):
        raise train.OutputError(
            f"{output} holds an earlier run; go on with --resume, or choose another --output-dir."
        )
    return output, mesh_of(config.mesh)


def write_metrics(output: pathlib.Path, metrics: Mapping[str, Any]) -> None:
    """metrics.json, and a line that says where it lies."""
    text = json.dumps(metrics, indent=2) + "\n"
    written_once(lambda: (output / "metrics.json").write_text(text), str(output))
    print(f"metrics and figure in {output}")


def make_optimizer(settings: flags.Optimisation) -> optax.GradientTransformation:
    """The optimizer that the flags ask for."""
    return train.make_optimizer(
        settings.learning_rate,
        total_steps=settings.max_steps,
        schedule=getattr(train, settings.schedule),
        warmup_ratio=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        rule=OPTIMIZERS[settings.optimizer](),
    )


def method_of(config: Any, build: Callable[[Forward], Objective], forward: Forward) -> Sharpened:
    """The objective `build(forward)` with the optimizer and the --sharpness that the flags ask for."""
    settings = config.optimisation
    optimizer = make_optimizer(settings)
    return sharpen(settings.sharpness, build, forward, optimizer, settings.rho)


def fit(
    config: Any,
    params: Any,
    method: Sharpened,
    batches: Any,
    callbacks: list[train.Callback],
    output: pathlib.Path,
    mesh: Any,
    *,
    best: str | None = "eval/loss",
    books: Mapping[str, train.Book] | None = None,
    donate: bool = False,
) -> tuple[train.TrainState, list[train.Row]]:
    """`train.fit` with the flags' steps, seed, microbatches, logs and checkpoints."""
    path = output / "checkpoints"
    every, resume = config.output.save_steps, config.output.resume
    return train.fit(
        params,
        method.objective,
        method.optimizer,
        batches,
        steps=config.optimisation.max_steps,
        key=jax.random.key(config.seed),
        gradient=method.gradient,
        extra_args=method.extra_args,
        microbatches=config.optimisation.gradient_accumulation_steps,
        books=books,
        mesh=mesh,
        callbacks=[*callbacks, *logs(config, output)],
        checkpoints=train.Checkpoints(path, every=every, best=best, resume=resume),
        donate=donate,
    )


def losses_of(history: Sequence[train.Row]) -> dict[str, Any]:
    """The steps, the first and the last loss of a run, and its last in evaluation."""
    evaluated = [row for row in history if "eval/loss" in row]
    return {
        "steps": history[-1]["step"],
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "eval_loss": evaluated[-1]["eval/loss"] if evaluated else None,
    }


def load_base(
    config: Any,
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
    settings = config.base
    opened = files.open_model(settings.model)
    shapes = files.model_shapes(opened, scan_layers=settings.scan_layers)
    trains_all = make_optimizer(config.optimisation) if config.adapter == "full" else None
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
    model, base = files.load_model(opened, mesh=mesh, scan_layers=settings.scan_layers)
    dtype = jnp.bfloat16 if settings.bfloat16 else jnp.float32
    model = model.clone(dtype=dtype, remat=settings.remat)
    (check or check_length)(config, model)
    return model, base


def adapt_params(config: Any, model: Any, base: Any, mesh: Any) -> Any:
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


def callbacks(
    config: Any, objective: Any, eval_batches: Any, output: pathlib.Path, mesh: Any
) -> list[train.Callback]:
    """Evaluation, progress and the figure of a run on rows."""
    title = f"{config.base.model}, {config.adapter}"
    return [
        train.evaluation(objective, eval_batches, steps=config.rows.eval_steps, mesh=mesh),
        train.progress(steps=config.output.logging_steps),
        train.run_figure(output / "training.png", title=title),
    ]


def logs(config: Any, output: pathlib.Path) -> list[train.Callback]:
    """Where the metrics of all steps go, and a profile if the flags ask for one."""
    found = [train.jsonl_log(output / "metrics.jsonl")]
    found += [flags.LOGS[name](config, output) for name in config.output.report_to]
    return found + ([train.profile(path)] if (path := config.output.profile_dir) else [])


def save(
    config: Any,
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
        difference = files.save_merged(
            path, model, params, tokenizer_from=config.base.model, mesh=mesh
        )
        print(f"model saved to {path}; read again: {difference}")
        return
    path, native = output / "adapter", None
    try:
        adapter_tensors(model.config, params)
    except AdapterError as error:
        print(f"jaxft's own format: {error}")
        native = {"name": config.adapter, **adapter_settings(config)}
    difference = save_checked(
        path, model, params, base, base_model=config.base.model, native=native
    )
    print(f"adapter saved to {path}; read again: {difference}")
    if (lost := rounding_loss(params, base, family_of(model.config).layers)) is not None:
        print(
            f"{config.kernels.quantise} took up to {lost:.1%} of a kernel, and the adapter trained with "
            "that; PEFT's files do not say so: quantise the base alike where you use it."
        )


def adapter_settings(config: Any) -> dict[str, Any]:
    """The arguments of `apply_named` in the flags."""
    return dataclasses.asdict(config.kernels) | {"seed": config.seed}


def mesh_of(settings: flags.Mesh) -> Any:
    """The mesh that the flags ask for; None on one device."""
    names = {"data": "data_axis", "fsdp": "fsdp", "tensor": "tensor", "context": "context"}
    sizes = {axis: getattr(settings, name) for axis, name in names.items()}
    if set(sizes.values()) != {1}:
        return make_mesh(**sizes, slices=settings.slices)
    if jax.device_count() == 1:
        return None
    return make_mesh(devices=jax.devices()[:1]) if jax.process_count() == 1 else make_mesh()


def check_length(config: Any, model: Any) -> None:
    """Whether the model has the positions, and the batch can be split."""
    length, size, context = config.rows.max_length, config.rows.batch_size, config.mesh.context
    check_positions(model, config.base.model, length)
    if context < 1 or length % context or MIN_BUCKET % context:
        raise ValueError(
            f"--context {context} must divide --max-length {length} and {MIN_BUCKET}, the length of the "
            "shortest rows."
        )
    slices = config.optimisation.gradient_accumulation_steps
    parts = slices * jax.process_count()
    if parts < 1 or size < 1 or size % parts:
        raise ValueError(
            f"--batch-size {size} must be a positive multiple of --gradient-accumulation-steps ({slices}) "
            f"times the {jax.process_count()} processes."
        )


def with_held_out(
    config: Any,
    sources: list[list],
    load: Callable[[str], list],
    ask: Callable[[Any], str],
) -> tuple[list[list], list]:
    """(what of the sources trains, held-out records: of --eval-data, or a part of each source).

    Held-out records whose question also trains are left out: those would measure memory.

    Raises:
        DataError: if none is left.
        ValueError: for a --validation that --eval-data leaves without effect.
    """
    if config.eval_data and "validation" in choices.given(config):
        raise ValueError(
            f"--validation {config.rows.validation} has no effect with --eval-data {config.eval_data}; "
            'give --eval-data "" to hold out a part of --data.'
        )
    if config.eval_data:
        held_out = load(config.eval_data)
    else:
        pairs = [data.split(records, config.rows.validation) for records in sources]
        sources, held_out = [pair[0] for pair in pairs], [r for pair in pairs for r in pair[1]]
        if not held_out:
            raise data.DataError("no record is held out; raise --validation or give --eval-data.")
    known = {ask(record) for records in sources for record in records}
    return sources, without_known(held_out, known, ask)


def tell_of(bad: data.BadRecords) -> None:
    """Prints how many records were left out or cut, if any were."""
    if bad.summary():
        print(f"records left out or cut: {bad.summary()}")


def without_known(held_out: list, known: set[str], ask: Callable[[Any], str]) -> list:
    """The held-out records whose question is not among `known`; DataError if none is left."""
    left = [record for record in held_out if ask(record) not in known]
    if not left:
        raise data.DataError("every held-out record is also in the training data.")
    return left


def question(record: Mapping[str, Any], messages: Any) -> str:
    """What a record asks: its user turns, its prompt or its text."""
    if messages is None:
        return record.get("prompt") or record.get("text") or str(record.get("tokens"))
    return "\n".join(m["content"] for m in messages if m["role"] == "user")
