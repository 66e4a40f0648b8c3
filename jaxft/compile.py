"""Compiles a real train step for other machines' hardware: python -m jaxft.compile --topology v5e:4x4

    python -m jaxft.compile --model llama3-8b --adapter paca --topology v5p:4x4x4 --fsdp 16 --tensor 4
    python -m jaxft.compile --model path/to/config.json --adapter full --topology h100:8 --json

The target's own compiler (`make aot`) needs only shapes: no weights, no device. The program prints
the memory and FLOPs of one device, the bytes that devices exchange, and whether the step fits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import tyro

from jaxft.models.presets import PRESETS
from jaxft.parallel import CompiledCost, compile_environment, path_name
from jaxft.parallel.topology import slices_of
from jaxft.train.ahead import EXPERIENCE, Name, plan


class Chip(NamedTuple):
    """Public figures of one device."""

    flops: float  # peak per second, bfloat16
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes per second
    link: float  # to the other devices, bytes per second


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9),
}


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
    rank: int = 16  # of the adapter, if it has one; the dimension of classify's random subspace
    optimizer: Literal["adamw", "lion"] = "adamw"  # its state is part of the memory
    quantise: Literal["nf4", "int8", "int4", "fp8"] | None = None  # of the frozen kernels
    rows: int = 2  # of each shard of the batch
    length: int = 2048  # tokens of a row
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
    import jax

    from jaxft import train
    from jaxft.adapters import partition
    from jaxft.parallel import compile_only_devices, compiled_cost

    devices = compile_only_devices(config.topology)
    step, state, batch, model = lay_out_step(config, devices)
    compiled = train.jit_step(step).lower(state, batch).compile()
    trains = sum(leaf.size for leaf in jax.tree.leaves(partition(state.params)[0]))
    shared = config.share_prompts > 1
    size = config.length + (config.share_prompts - 1) * config.response if shared else None
    tokens = sum(
        math.prod(part["tokens"].shape) if size is None else len(part["tokens"]) * size
        for part in (batch, batch.get("online"))
        if part
    )
    mesh = dict(batch["tokens"].sharding.mesh.shape)
    return _figures(config, compiled_cost(compiled), tokens, mesh, model, trains)


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
    model = family_of(architecture).module(
        architecture, dtype=dtype, scan_layers=True, remat=config.remat
    )
    rows = config.rows * row_shards(mesh) * config.microbatches
    planned = plan(
        config.objective, model, rows, config.length, config.response, config.rank, mesh,
        config.share_prompts,
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
    from jaxft.adapters import apply_named, partition
    from jaxft.models import family_of
    from jaxft.parallel import param_shardings, replicated

    family = family_of(model.config)

    def start(key):
        params = model.init(key, model.example_input())["params"]
        if config.adapter != "full":  # trained params are float32 in any case
            params = jax.tree.map(lambda leaf: leaf.astype(model.dtype), params)
        options = dict(
            rank=config.rank,
            alpha=2.0 * config.rank,
            quantise=config.quantise,
            seed=0,
            targets=family.targets,
            layers=family.layers,
            stacked=family.stacked_axes,
        )
        params = planned.params(apply_named(params, config.adapter, **options))
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


def _figures(config, cost: CompiledCost, tokens, mesh, model, trains) -> dict[str, Any]:
    devices = math.prod(mesh.values())
    chip = CHIPS[slices_of(config.topology)[1].split(":")[0]]
    flops = _matmul_flops(model, config, tokens) / devices
    # The rate of the network between slices is unknown.
    exchanged = sum(size for kind, (_, size) in cost.exchanged.items() if kind != "between slices")
    return {
        "fits": cost.peak_bytes <= chip.memory,
        "memory_bytes": chip.memory,
        "peak_bytes": cost.peak_bytes,
        "argument_bytes": cost.argument_bytes,
        "temp_bytes": cost.temp_bytes,
        "tokens": tokens,
        "trains": trains,
        "step_flops": flops,
        "estimated_cycles": cost.cycles,
        "collectives": cost.exchanged,
        "ideal_exchanged_bytes": ideal_exchanged(config, model, mesh, tokens),
        "compute_s": flops / chip.flops,
        # A lower bound: arguments are read forward and backward, gathered arrays are written and
        # read.
        "memory_s": 2 * (cost.argument_bytes + exchanged) / chip.bandwidth,
        "exchange_s": exchanged / chip.link,
    }


def ideal_exchanged(
    config: Config, model: Any, mesh: Mapping[str, int], tokens: int
) -> float | None:
    """Bytes that a device's collectives give it: params in FSDP, and tokens to their experts and back.

    FSDP gathers each param twice and, if all are trained, adds up its gradient. Of experts that the axis
    `expert` splits, a device gathers its own, over `fsdp`; k rows of each token move along `expert` in two
    all-to-alls, forward and backward. All in the data type of the computation and, as in `exchanged_bytes`,
    with the device's own share. A compiler may need fewer: embeddings are looked up, not gathered. None for
    other meshes and quantised kernels, which exchange other arrays.

    Args:
        mesh: name of an axis -> its size.
        tokens: of a step, over all devices.
    """
    from jax.tree_util import tree_leaves_with_path

    parts, fsdp = mesh["expert"], mesh["fsdp"]
    devices = parts * fsdp
    if config.quantise or math.prod(mesh.values()) != devices:
        return None
    leaves = [(path_name(p), math.prod(x.shape)) for p, x in tree_leaves_with_path(_shapes(model))]
    own = sum(size for name, size in leaves if "/experts/" in name)
    others = sum(size for _, size in leaves) - own
    times = 3 if config.adapter == "full" else 2
    moved = times * (others * (devices > 1) + own / parts * (fsdp > 1))
    if parts > 1 and (experts := getattr(model.config, "experts", None)):
        layers = sum(model.config.has_experts(i) for i in range(model.config.num_layers))
        rows = tokens / devices * experts.per_token
        moved += 4 * layers * rows * model.config.hidden_size
    return moved * (4 if config.float32 else 2)


def _matmul_flops(model, config: Config, tokens: int) -> float:
    """FLOPs of the projections and the vocabulary, for all devices, without attention's products.

    Forward and the gradient of activations take 2 each per parameter and token, the gradient of
    kernels, if they are trained, 2 more, and full recomputation another 2.
    """
    from jax.tree_util import tree_leaves_with_path

    from jaxft.models import family_of

    linear = re.compile(family_of(model.config).targets.linear)
    is_linear = lambda path: linear.fullmatch(path_name(path))
    leaves = tree_leaves_with_path(_shapes(model))
    experts = getattr(model.config, "experts", None)
    # A token passes only some of the experts.
    active = lambda path: experts.per_token / experts.count if "/experts/" in path_name(path) else 1
    layers = sum(math.prod(leaf.shape) * active(path) for path, leaf in leaves if is_linear(path))
    passes = 2 + (config.adapter == "full")
    encoder = config.objective == "classify"
    head = 0 if encoder else model.config.vocab_size * model.config.hidden_size
    # tram evaluates a second gradient, at the perturbed params.
    tokens *= 1 + (config.objective == "tram")
    return 2.0 * tokens * (layers * (passes + (config.remat == "full")) + head * passes)


def _shapes(model):
    import jax

    return jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]


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
