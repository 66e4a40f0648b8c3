"""Compiles a real train step for other machines' hardware: python -m jaxft.compile --topology v5e:4x4

    python -m jaxft.compile --model llama3-8b --adapter paca --topology v5p:4x4x4 --fsdp 16 --tensor 4
    python -m jaxft.compile --model path/to/config.json --adapter full --topology h100:8 --json

The target's own compiler (`make aot`) needs only shapes: no weights, no device. The program prints
the memory and FLOPs of one device, the bytes that devices exchange, and whether the step fits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import tyro

from jaxft.models.presets import PRESETS
from jaxft.parallel import compile_environment
from jaxft.parallel.topology import slices_of
from jaxft.train.ahead import EXPERIENCE, Name, plan


@dataclasses.dataclass(frozen=True)
class Config:
    """The step to compile and its target."""

    # a name of PRESETS, such as llama3-8b, qwen3-30b-a3b or gemma3-27b; or a config.json
    model: str = "llama3-8b"
    # see jaxft.train.ahead; grpo, ppo and nft: the update on sampled responses
    objective: Name = "sft"
    # see jaxft.parallel.compile_only_devices: v5p:2x2x4, h100:8, 2*v5e:4x4
    topology: str = "v5e:4x4"
    data: int = 1  # mesh: copies of the model; -1 fills
    fsdp: int = -1  # mesh: shards of params and batch; -1 fills
    tensor: int = 1  # mesh: shards of each projection
    expert: int = 1  # mesh: shards of the experts and of the batch
    context: int = 1  # mesh: shards of each row's tokens
    adapter: str = "lora"  # see experiments/sft.py; full: all params are trained
    # kernels that the adapter adapts; language or vision: of one part. With adapter full, language: all
    # params except those of the parts for images and sounds
    target: str = "all-linear"
    rank: int = 16  # of the adapter, if it has one; the dimension of classify's random subspace
    optimizer: Literal["adamw", "lion"] = "adamw"  # its state is part of the memory
    quantise: Literal["nf4", "int8", "int4", "fp8"] | None = None  # of the frozen kernels
    rows: int = 2  # of each shard of the batch
    length: int = 2048  # tokens of a row
    # of models that read images or sounds: images or clips of a row (PaliGemma, SmolVLM, Qwen2-Audio), or its
    # squares of patches (Qwen2.5-VL: one for each token of an image); 0: rows of text
    media: int = 0
    response: int = 1024  # tokens at the end of a row that grpo, ppo and nft train on
    # grpo, ppo and nft: responses of a group; above 1, a row is a group, whose prompt is computed once
    share_prompts: int = 1
    microbatches: int = 1  # sequential parts of the batch
    remat: Literal["none", "lean", "dots", "full"] = "full"  # what the backward pass recomputes
    float32: bool = False  # compute in float32; else bfloat16, with frozen params in bfloat16
    triton: bool = True  # GPUs: products by Triton; else by cuBLAS, where Triton fails untuned
    layers: int | None = None  # fewer than in the model, for a quick estimate
    json: bool = False  # one JSON line


def main(config: Config) -> dict[str, Any]:
    """Compiles in a separate process; returns and prints the figures."""
    settings = json.dumps(dataclasses.asdict(config))
    call = [sys.executable, "-m", "jaxft.compile", "--here"]
    environment = compile_environment(triton=config.triton)
    result = subprocess.run(call, input=settings, capture_output=True, text=True, env=environment)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "exceeds available HBM" in line]
        if not lines:
            errors = re.findall(r"^(?:\w+\.)*\w*Error: .*$", result.stderr, re.MULTILINE)
            raise RuntimeError(errors[-1] if errors else result.stderr.strip()[-500:])
        figures = {
            "fits": False,
            "reason": re.sub(r".*(HbmOom|EXHAUSTED): ", "", lines[-1]).strip(),
        }
    else:
        figures = json.loads(result.stdout.strip().splitlines()[-1])
    print(json.dumps(figures) if config.json else describe(config, figures))
    return figures


def describe(config: Config, figures: dict[str, Any]) -> str:
    """The figures in words."""
    head = f"{config.model}, {config.adapter}, {config.topology}"
    if not figures["fits"]:
        return f"{head}: does not fit: {figures.get('reason', figures)}"
    gib = lambda name: f"{figures[name] / 2**30:.2f} GiB"
    moved = ", ".join(
        f"{count} {kind} ({size / 2**20:.1f} MiB)"
        for kind, (count, size) in figures["collectives"].items()
    )
    bound = (
        f"{figures['compute_s']:.3f} s computing, {figures['memory_s']:.3f} s reading memory, "
        f"{figures['exchange_s']:.3f} s exchanging"
    )
    ideal = figures["ideal_exchanged_bytes"]
    ideal = f"; FSDP needs {ideal / 2**20:.1f} MiB" if ideal else ""
    return "\n".join(
        (
            f"{head}: fits; of {gib('memory_bytes')} a device needs {gib('peak_bytes')}",
            f"  arguments {gib('argument_bytes')}, temporaries {gib('temp_bytes')}",
            f"  {figures['tokens']} tokens per step, {figures['step_flops'] / 1e12:.1f} TFLOP per device",
            f"  exchanged per step and device: {moved or 'nothing'}{ideal}",
            f"  no step is shorter than {bound}",
        )
    )


class LaidOutStep(NamedTuple):
    """A step and the shapes of its arguments on a mesh."""

    step: Any  # of `make_step`
    state: Any  # TrainState of jax.ShapeDtypeStruct
    batch: dict[str, Any]
    model: Any


def compile_step(config: Config) -> dict[str, Any]:
    """The figures of one device; the process must have been started with `compile_environment()`."""
    from jaxft import train
    from jaxft.parallel import compile_only_devices, compiled_cost
    from jaxft.train.bounds import figures

    devices = compile_only_devices(config.topology)
    step, state, batch, model = lay_out_step(config, devices)
    cost = compiled_cost(train.jit_step(step).lower(state, batch).compile())
    return figures(config, cost, model, state.params, batch)


def lay_out_step(config: Config, devices: Sequence[Any]) -> LaidOutStep:
    """The step and the shapes of its state and batch on a mesh of these devices.

    Raises:
        ValueError: if the settings do not fit each other, the model or the devices.
    """
    import jax.numpy as jnp

    from jaxft import train
    from jaxft.models import family_of
    from jaxft.optim import scale_by_lion
    from jaxft.parallel import make_mesh, row_shards

    if config.objective in EXPERIENCE and not 0 < config.response < config.length:
        raise ValueError(
            f"--response {config.response} must lie below --length {config.length}: a prompt comes first."
        )
    if config.share_prompts != 1 and (
        config.objective not in EXPERIENCE or config.share_prompts < 1
    ):
        raise ValueError(
            f"--share-prompts {config.share_prompts} needs --objective {', '.join(EXPERIENCE)}, and at least "
            "1 response."
        )
    axes = {name: getattr(config, name) for name in ("data", "fsdp", "tensor", "expert", "context")}
    mesh = make_mesh(**axes, slices=slices_of(config.topology)[0], devices=devices)
    if config.length % mesh.shape["context"]:
        raise ValueError(
            f"--length {config.length} must be a multiple of --context {mesh.shape['context']}."
        )
    dtype = jnp.float32 if config.float32 else jnp.bfloat16
    architecture = _model_config(config)
    if config.media < 0 or config.media and not getattr(architecture, "towers", ()):
        raise ValueError(
            f"--media {config.media} needs a model that reads images or sounds, and at least 1 of them; "
            f"{config.model} is {architecture.family}."
        )
    if config.media and config.share_prompts > 1:
        raise ValueError("--share-prompts needs --media 0: images and sounds are read row by row.")
    model = family_of(architecture).module(
        architecture, dtype=dtype, scan_layers=True, remat=config.remat
    )
    rows = config.rows * row_shards(mesh) * config.microbatches
    planned = plan(
        config.objective, model, rows, config.length, config.response, config.rank, mesh,
        config.share_prompts, config.media,
    )  # fmt: skip
    rule = scale_by_lion() if config.optimizer == "lion" else None
    optimizer = planned.optimizer(train.make_optimizer(1e-4, total_steps=1000, rule=rule))
    step = train.make_step(
        planned.objective,
        optimizer,
        microbatches=config.microbatches,
        extra_args=planned.extra_args,
    )
    state = _state(config, model, planned, optimizer, mesh)
    return LaidOutStep(step, state, planned.batch, model)


def _state(config, model, planned, optimizer, mesh):
    """The shapes of the TrainState on the mesh."""
    import jax
    import optax

    from jaxft import train
    from jaxft.adapters import apply_named, freeze_towers, partition
    from jaxft.models import family_of
    from jaxft.parallel import param_shardings, replicated

    family = family_of(model.config)

    def start(key):
        params = model.init(key, model.example_input())["params"]
        if config.adapter != "full":  # trained params are float32 in any case
            params = jax.tree.map(lambda leaf: leaf.astype(model.dtype), params)
        options = dict(
            rank=config.rank,
            target=config.target,
            alpha=2.0 * config.rank,
            quantise=config.quantise,
            seed=0,
            targets=family.targets,
            layers=family.layers,
            stacked=family.stacked_axes,
        )
        params = apply_named(params, config.adapter, **options)
        if config.adapter == "full" and config.target == "language":
            params = freeze_towers(params, model.config)
        params = planned.params(params)
        return train.init_state(params, optimizer, jax.random.key(0))

    state = jax.eval_shape(start, jax.random.key(0))
    shardings = param_shardings(state.params, mesh, family.rules, family.layers)
    single = replicated(mesh)
    # The optimizer's state is sharded like its params; its counters are replicated.
    moments = optax.tree_map_params(
        optimizer, lambda _, s: s, state.opt_state, partition(shardings)[0],
        transform_non_params=lambda _: single,
    )  # fmt: skip
    place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
    return train.TrainState(
        step=place(state.step, single),
        params=jax.tree.map(place, state.params, shardings),
        opt_state=jax.tree.map(place, state.opt_state, moments),
        carry=None,
        key=place(state.key, single),
    )


def _model_config(config: Config):
    from jaxft.models import config_of, family_of

    if config.model in PRESETS:
        settings = dict(PRESETS[config.model])
    else:
        path = pathlib.Path(config.model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"--model {config.model!r} is neither a preset ({', '.join(PRESETS)}) nor a config.json."
            )
        settings = json.loads(path.read_text())
    result = config_of(settings)
    encoder, classifies = (
        not hasattr(family_of(result).module, "forward"),
        config.objective == "classify",
    )
    if encoder != classifies:
        needed = "an encoder of text" if classifies else "a language model"
        raise ValueError(
            f"--model {config.model!r} is {result.family}; --objective {config.objective} needs {needed}."
        )
    if config.layers:
        windows = {} if encoder else {"windows": result.windows[: config.layers]}
        result = dataclasses.replace(result, num_layers=config.layers, **windows)
    return result


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        print(json.dumps(compile_step(Config(**json.loads(sys.stdin.read())))))
    else:
        try:
            main(tyro.cli(Config, description=__doc__))
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
