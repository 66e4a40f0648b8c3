"""Lower bounds of steps compiled ahead of time: FLOPs, bytes to read and bytes to exchange."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.tree_util import tree_leaves_with_path

from jaxft.adapters import partition
from jaxft.models import family_of
from jaxft.models.layers import Dense
from jaxft.parallel import CompiledCost, path_name
from jaxft.parallel.topology import slices_of


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


def figures(
    config: Any, cost: CompiledCost, model: Any, params: Any, batch: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of one device, as JSON.

    Args:
        config: a `jaxft.compile.Config`.
        cost: of the compiled step.
        model: the step's.
        params: shapes of the step's params, adapted.
        batch: shapes of its batch on the mesh.
    """
    mesh = dict(batch["tokens"].sharding.mesh.shape)
    tokens = _tokens(config, batch)
    chip = CHIPS[slices_of(config.topology)[1].split(":")[0]]
    frozen = frozen_towers(model, params)
    flops = matmul_flops(config, model, tokens, batch, frozen) / math.prod(mesh.values())
    # The rate of the network between slices is unknown.
    exchanged = sum(size for kind, (_, size) in cost.exchanged.items() if kind != "between slices")
    return {
        "fits": cost.peak_bytes <= chip.memory,
        "memory_bytes": chip.memory,
        "peak_bytes": cost.peak_bytes,
        "argument_bytes": cost.argument_bytes,
        "temp_bytes": cost.temp_bytes,
        "tokens": tokens,
        "trains": sum(leaf.size for leaf in jax.tree.leaves(partition(params)[0])),
        "step_flops": flops,
        "estimated_cycles": cost.cycles,
        "collectives": cost.exchanged,
        "ideal_exchanged_bytes": ideal_exchanged(config, model, mesh, tokens, frozen),
        "compute_s": flops / chip.flops,
        # A lower bound: arguments are read forward and backward, gathered arrays are written and
        # read.
        "memory_s": 2 * (cost.argument_bytes + exchanged) / chip.bandwidth,
        "exchange_s": exchanged / chip.link,
    }


def _tokens(config, batch):
    shared = config.share_prompts > 1
    size = config.length + (config.share_prompts - 1) * config.response if shared else None
    return sum(
        math.prod(part["tokens"].shape) if size is None else len(part["tokens"]) * size
        for part in (batch, batch.get("online"))
        if part
    )


def frozen_towers(model: Any, params: Any) -> frozenset[str]:
    """Names of the model's parts for images and sounds in which nothing trains."""
    trained = [f"/{path_name(path)}" for path, _ in tree_leaves_with_path(partition(params)[0])]
    towers = (tower.name for tower in getattr(model.config, "towers", ()))
    return frozenset(name for name in towers if not any(f"/{name}/" in path for path in trained))


def ideal_exchanged(
    config: Any, model: Any, mesh: Mapping[str, int], tokens: int, frozen: frozenset[str]
) -> float | None:
    """Bytes that a device's collectives give it: params in FSDP, and tokens to their experts and back.

    FSDP gathers each param twice and, if all are trained, adds up its gradient; those of a frozen part for
    images once, and not at all in steps without images. Of experts that the axis `expert` splits, a device
    gathers its own, over `fsdp`; k rows of each token move along `expert` in two all-to-alls, forward and
    backward. All in the data type of the computation and, as in `exchanged_bytes`, with the device's own
    share. A compiler may need fewer: embeddings are looked up, not gathered. None for other meshes and
    quantised kernels, which exchange other arrays.

    Args:
        config: a `jaxft.compile.Config`.
        mesh: name of an axis -> its size.
        tokens: of a step, over all devices.
        frozen: of `frozen_towers`.
    """
    parts, fsdp = mesh["expert"], mesh["fsdp"]
    devices = parts * fsdp
    if config.quantise or math.prod(mesh.values()) != devices:
        return None
    usual = 3 if config.adapter == "full" else 2
    towers = {tower.name for tower in getattr(model.config, "towers", ())}
    own = others = 0
    for path, leaf in tree_leaves_with_path(_shapes(model)):
        name = path_name(path)
        part = name.split("/")[0]
        times = 1 if part in frozen else usual
        times = 0 if part in towers and not config.media else times
        if "/experts/" in name:
            own += times * math.prod(leaf.shape)
        else:
            others += times * math.prod(leaf.shape)
    moved = others * (devices > 1) + own / parts * (fsdp > 1)
    if parts > 1 and (experts := getattr(model.config, "experts", None)):
        layers = sum(model.config.has_experts(i) for i in range(model.config.num_layers))
        rows = tokens / devices * experts.per_token
        moved += 4 * layers * rows * model.config.hidden_size
    return moved * (4 if config.float32 else 2)


def matmul_flops(
    config: Any, model: Any, tokens: int, batch: Mapping[str, Any], frozen: frozenset[str]
) -> float:
    """FLOPs of the projections and the vocabulary, for all devices, without attention's products.

    Forward and the gradient of activations take 2 each per parameter and token, the gradient of
    kernels, if they are trained, 2 more, and full recomputation another 2. A frozen part for images runs
    forward only.
    """
    linear = re.compile(family_of(model.config).targets.linear)
    towers = getattr(model.config, "towers", ())
    names = {tower.name for tower in towers}
    experts = getattr(model.config, "experts", None)

    def weight(path, leaf):
        name = path_name(path)
        if not linear.fullmatch(name) or name.split("/")[0] in names:
            return 0.0
        # A token passes only some of the experts.
        share = experts.per_token / experts.count if "/experts/" in name else 1
        return math.prod(leaf.shape) * share

    layers = sum(weight(*leaf) for leaf in tree_leaves_with_path(_shapes(model)))
    passes = 2 + (config.adapter == "full")
    recomputed = config.remat == "full"
    encoder = config.objective == "classify"
    head = 0 if encoder else model.config.vocab_size * model.config.hidden_size
    # tram evaluates a second gradient, at the perturbed params.
    times = 1 + (config.objective == "tram")
    media = sum(
        dense_flops(tower, batch) * (1 if tower.name in frozen else passes + recomputed)
        for tower in towers
        if config.media
    )
    return times * (2.0 * tokens * (layers * (passes + recomputed) + head * passes) + media)


def dense_flops(tower: Any, batch: Mapping[str, Any]) -> int:
    """FLOPs of a tower's linear layers in one forward pass over the shapes of its columns [B, M, ...]."""
    found = []

    def count(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, Dense):
            found.append(2 * args[0].size * y.shape[-1])
        return y

    columns = [batch[name] for name in tower.columns]
    module = tower.module("float32", "none")
    with nn.intercept_methods(count):
        jax.eval_shape(module.init, jax.random.key(0), *columns)
    return sum(found)


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]
