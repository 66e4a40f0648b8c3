"""Steps that the main functions of the training scripts share, in the order of the calls.

`config` is that of a script: it has the groups base, kernels, optimisation, mesh and output of `flags`, and
the flags adapter, seed and smoke; scripts that read rows of records also have the group rows and eval_data.
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

from experiments.cli import adapters, cards, choices, flags, limits, resuming
from experiments.cli.models import check_positions
from experiments.cli.optimizers import OPTIMIZERS, SHARPNESS, Sharpened, sharpen
from jaxft import checkpoints as files
from jaxft import train
from jaxft.adapters import (
    AdapterError,
    adapter_tensors,
    apply_named,
    count,
    float32_masters,
    rounding_loss,
    save_checked,
)
from jaxft.data.batching import MIN_BUCKET
from jaxft.models import EncoderDecoderConfig, Forward, family_of, tiny_config
from jaxft.objectives import Objective, RouterTerms
from jaxft.parallel import connect_hosts, make_mesh, row_shards, shard_params, written_once

# The settings of every --smoke.
TINY = {"model": "tiny", "rank": 2, "alpha": 4.0}


def start(config: Any, small: Mapping[str, Any]) -> Any:
    """Returns the config, with `small` for --smoke; joins the other hosts, of which only the first prints."""
    adapters.check(limits.check(config))
    choices.check(config, "sharpness", SHARPNESS)
    if config.smoke:
        if "data" in choices.given(config):  # A part of these data is then held out.
            small = {name: x for name, x in small.items() if name != "eval_data"}
        config = flags.with_small(config, TINY | small)
    connect_hosts(config.mesh.distributed)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    train.keep_memory_warm()
    return config


def place(config: Any) -> tuple[pathlib.Path, Any]:
    """Returns (output directory, mesh); checks early that the directory is writable.

    The mesh is None on one device.
    """
    cards.check(config)
    output = pathlib.Path(config.output.output_dir)
    train.writable_directory(output)
    if config.output.profile_dir:
        train.writable_directory(config.output.profile_dir)
    if config.output.resume:
        resuming.check(config, output)
    elif any((output / "checkpoints").glob("[0-9]*")):
        raise train.OutputError(
            f"{output} holds an earlier run; continue it with --resume, or choose another --output-dir."
        )
    mesh = mesh_of(config.mesh)
    check_rows(config, mesh)
    return output, mesh


def write_metrics(output: pathlib.Path, metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json and prints its directory."""
    text = json.dumps(metrics, indent=2) + "\n"
    written_once(lambda: (output / "metrics.json").write_text(text), str(output))
    print(f"metrics and figure in {output}")


def make_optimizer(settings: flags.Optimisation) -> optax.GradientTransformation:
    """Returns the optimizer of the flags."""
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
    """Returns the objective `build(forward)` with the flags' optimizer and --sharpness."""
    settings = config.optimisation
    optimizer = make_optimizer(settings)
    return sharpen(settings.sharpness, build, forward, optimizer, settings.rho)


def router_terms(config: Any, model: Any) -> RouterTerms:
    """Returns the weights of the routers' losses; raises ValueError for a model without experts."""
    terms = RouterTerms(config.router_balance, config.router_z)
    if terms != RouterTerms() and getattr(model.config, "experts", None) is None:
        raise ValueError(
            f"--router-balance {config.router_balance} and --router-z {config.router_z} are losses of "
            f"experts, which {config.base.model} has not; leave them out."
        )
    return terms


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
    """Calls `train.fit` with the flags' steps, seed, microbatches, logs and checkpoints."""
    path = output / "checkpoints"
    every, resume = config.output.save_steps, config.output.resume
    noted = [resuming.note(config, output)] if resume else []
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
        callbacks=[*noted, *callbacks, *logs(config, output)],
        checkpoints=train.Checkpoints(
            path, every=every, best=best, resume=resume, settings=resuming.settings(config)
        ),
        donate=donate,
    )


def losses_of(history: Sequence[train.Row], name: str) -> dict[str, Any]:
    """Returns the steps, first, last and last evaluated loss of a run, and the evaluation's name."""
    evaluated = [row for row in history if "eval/loss" in row]
    return {
        "steps": history[-1]["step"],
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "eval_loss": evaluated[-1]["eval/loss"] if evaluated else None,
        "evaluated_on": name,
    }


def load_base(
    config: Any,
    mesh: Any,
    check: Callable[[Any, Any], None] | None = None,
    *,
    keeps_start: bool = False,
) -> tuple[Any, Any]:
    """Loads (model, base params) on the mesh in the files' dtypes, or in float32 if all of them train.

    Args:
        check: function of (config, model) that checks settings before loading; None: `check_length`.
        keeps_start: whether training also needs the base, as a reference model.

    Raises:
        ValueError: if they cannot fit in the available memory.
    """
    settings = config.base
    opened = files.open_model(settings.model)
    shapes = files.model_shapes(opened, scan_layers=settings.scan_layers)
    whole = config.adapter == "full"
    trains_all = make_optimizer(config.optimisation) if whole else None
    devices = [jax.devices()[0]] if mesh is None else list(mesh.local_devices)
    wide = whole or config.adapter == "intrinsic"
    masters = jax.eval_shape(float32_masters, shapes) if wide else shapes
    family = family_of(tiny_config() if opened == "tiny" else opened.model.config)
    place = dict(mesh=mesh, rules=family.rules, layers=family.layers)
    needed = train.state_bytes(masters, trains_all, **place)
    if keeps_start and whole:  # Adapters share the frozen base.
        needed["reference"] = train.state_bytes(shapes, **place)["weights"]
    train.check_memory(
        needed,
        devices,
        "use --adapter lora instead of full, more shards (--fsdp, --tensor) or a smaller model; "
        "`python -m jaxft.compile` shows what a slice would need.",
    )
    # If the base is not needed separately, it is read directly as the float32 masters. A subspace changes
    # the kernels themselves: in bfloat16, rounding would lose most of its updates.
    model, base = files.load_model(
        opened,
        dtype=jnp.float32 if wide and not keeps_start else None,
        mesh=mesh,
        scan_layers=settings.scan_layers,
    )
    tell_of_masters(config, shapes)
    dtype = jnp.bfloat16 if settings.bfloat16 else jnp.float32
    model = model.clone(dtype=dtype, remat=settings.remat)
    (check or check_length)(config, model)
    check_virtual(config, model)
    return model, base


def tell_of_masters(config: Any, shapes: Any) -> None:
    """Prints the files' dtypes of fully trained params, if they are not float32."""
    stored = {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} & {"bfloat16", "float16"}
    if stored and config.adapter in ("full", "intrinsic"):
        print(
            f"{config.base.model} is stored in {' and '.join(sorted(stored))}; trainable params are kept "
            "and saved in float32."
        )


def adapt_params(config: Any, model: Any, base: Any, mesh: Any) -> Any:
    """Returns the base params with trainable params in float32: adapters, or all of them."""
    family = family_of(model.config)
    settings = adapter_settings(config)
    place = dict(targets=family.targets, layers=family.layers, stacked=family.stacked_axes)
    params = apply_named(base, config.adapter, **place, **settings)
    params = float32_masters(params)
    if mesh is not None:
        params = shard_params(params, mesh, family.rules, family.layers)
    return announce(params)


def announce(params: Any) -> Any:
    """Prints how many of the params train, and returns the params."""
    trains, total = count(params)
    print(f"{trains:,} of {total:,} parameters train ({trains / total:.2%}), in float32")
    return params


def callbacks(
    config: Any, objective: Any, eval_batches: Any, output: pathlib.Path, mesh: Any, name: str
) -> list[train.Callback]:
    """Returns evaluation, progress and figure of a run on rows; `name` describes the held-out records."""
    title = f"{config.base.model}, {config.adapter}; eval: {name}"
    return [
        train.evaluation(objective, eval_batches, steps=config.rows.eval_steps, mesh=mesh),
        train.progress(steps=config.output.logging_steps),
        train.run_figure(output / "training.png", title=title),
    ]


def logs(config: Any, output: pathlib.Path) -> list[train.Callback]:
    """Returns the loggers of all steps' metrics, and the profiler if --profile-dir is set."""
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
    """Saves the trained params in PEFT's or jaxft's format, or the `whole` model; rereads and compares."""
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
            f"{config.kernels.quantise} lost up to {lost:.1%} of a kernel, and the adapter trained with "
            "that; PEFT's files do not record it: quantise the base in the same way when you use it."
        )


def adapter_settings(config: Any) -> dict[str, Any]:
    """Returns the arguments of `apply_named` from the flags."""
    return dataclasses.asdict(config.kernels) | {"seed": config.seed}


def mesh_of(settings: flags.Mesh) -> Any:
    """Returns the mesh of the flags; None on one device."""
    sizes = {axis: getattr(settings, axis) for axis in ("fsdp", "tensor", "expert", "context")}
    sizes["data"] = settings.data_axis
    if set(sizes.values()) != {1}:
        return make_mesh(**sizes, slices=settings.slices)
    if settings.slices is not None:
        raise ValueError(
            f"--slices {settings.slices} has no effect on one device; lay the run over several by "
            "--data-axis, --fsdp or --tensor."
        )
    if jax.device_count() == 1:
        return None
    return make_mesh(devices=jax.devices()[:1]) if jax.process_count() == 1 else make_mesh()


def check_rows(config: Any, mesh: Any) -> None:
    """Raises ValueError if the devices cannot have as many rows each of a batch of --batch-size."""
    parts = 1 if mesh is None or not hasattr(config, "rows") else row_shards(mesh)
    if parts > 1 and config.rows.batch_size % parts:
        raise ValueError(
            f"--batch-size {config.rows.batch_size} cannot be laid over data x fsdp x expert = {parts} "
            f"devices; make it a multiple of {parts}, or use --tensor."
        )


def check_virtual(config: Any, model: Any) -> None:
    """Raises ValueError for virtual tokens of a model that has no place for them."""
    name, latent = config.adapter, getattr(model.config, "latent", None) is not None
    answers = isinstance(model.config, EncoderDecoderConfig)
    if (answers and name in ("prompt", "prefix")) or (latent and name == "prefix"):
        kind = "is an encoder-decoder" if answers else "has latent attention"
        raise ValueError(
            f"--adapter {name}: {config.base.model} {kind}, which has no place for these virtual tokens; use "
            "another adapter, such as lora or bottleneck."
        )


def check_length(config: Any, model: Any) -> None:
    """Checks that the model has enough positions, and that the batch can be split."""
    length, size, context = config.rows.max_length, config.rows.batch_size, config.mesh.context
    check_positions(model, config.base.model, length)
    if context != 1 and isinstance(model.config, EncoderDecoderConfig):
        raise ValueError(
            f"--context {context}: the rows of an encoder-decoder such as {config.base.model} are not split; "
            "use --fsdp or --tensor."
        )
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
