"""PaCA: Partial Connection Adaptation for Efficient Fine-Tuning (arXiv 2503.01905).

Four claims at a size for two CPU cores: PaCA keeps fewer activations for the backward pass than LoRA and
multiplies nothing more than the base model does; it learns as well as LoRA with as many parameters; and it
does not matter which inputs of a layer are chosen.

    python experiments/papers/paca/main.py
    python experiments/papers/paca/main.py --model smollm2       a real model on a reasoning-gym task; hours

The small model reads bytes: pretrained on Python's language reference, it moves to the source code of the
standard library, of which some files are held out for choosing learning rates, and others for the
figures. Each method has the best of four learning rates, chosen with a separate seed. `lean`
recomputes norms and activations on all sides; under full recomputation PaCA's advantage is gone, and where
memory and time go on accelerators is in benchmarks/aot_paca.py.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax._src.ad_checkpoint import saved_residuals

from experiments.cli import choices, flags, limits
from experiments.lab.claims import Claim, Number, mean, show
from experiments.lab.figures import intervals
from experiments.lab.seeds import begin
from experiments.papers.paca.tasks import Task, pretrained_task, small_task
from jaxft import train
from jaxft.adapters import (
    ALL_LINEAR,
    adapt,
    combine,
    count,
    float32_masters,
    full,
    in_place,
    lora,
    merge,
    paca,
    partition,
)
from jaxft.adapters.rules import Rule
from jaxft.models import DecoderConfig
from jaxft.models.blocks import Mlp
from jaxft.models.layers import Norm
from jaxft.models.remat import remat_lean
from jaxft.objectives import supervised

METHODS = ("full", "lora", "paca")
SELECTIONS = ("largest_norm", "smallest_norm")  # the ablation, beside PaCA's random choice
NEEDLE = "rg:needle_haystack?min_num_statements=4&max_num_statements=8"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, seeds and, with --model, the model and its data."""

    model: str | None = None  # None: the small byte model; else as for experiments/sft.py
    data: str = f"{NEEDLE}&size=2000&seed=1"  # with --model: the training data
    # one half selects learning rates, the other is reported
    eval_data: str = f"{NEEDLE}&size=200&seed=1000000"
    seeds: int = 3  # runs of each kind, each with its own seed
    pretrain_steps: int = 500  # pretraining steps of the byte model
    layers: int = 4  # layers of the byte model
    steps: int = 100  # steps of each fine-tuning run
    batch_size: int = 16  # rows per step
    microbatches: int = 1  # parts of a batch that are processed in turn
    length: int = 128  # tokens of a row
    rank: int = 8  # LoRA's; PaCA takes twice as many rows, about as many parameters
    learning_rate: float = 1e-3  # the grid is 1, 3, 10 and 30 times this
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/paca"
    preset: Literal["small", "full"] = "small"  # full: Llama-3-8B on OASST1's best paths, a pod
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    config = _sized(config)
    choices.check_companions(config, {"data": "model", "eval_data": "model"})
    train.keep_memory_warm()
    task = pretrained_task(config) if config.model else small_task(config)
    metrics = {
        "residuals": {r: {m: residuals(m, r) for m in METHODS} for r in ("none", "lean", "full")},
        "products": {method: products(method) for method in ("base", "lora", "paca")},
        "quality": compare(config, task),
    }
    print_residuals(metrics["residuals"])
    _figure(metrics, this.output)
    return this.finish(judge(metrics), metrics)


def rules(method: str, rank: int, pattern: str = ALL_LINEAR) -> dict[str, Rule]:
    """Returns the adapter rules of a method; "paca" and selection rules have 2 `rank` rows."""
    if method == "base":
        return {}
    if method == "full":
        return {".*": full()}
    if method == "lora":
        return {pattern: lora(rank, 2.0 * rank)}
    return {pattern: paca(2 * rank, selection="random" if method == "paca" else method)}


class GatedMlp(nn.Module):
    """x + down(silu(gate(rms(x))) * up(rms(x))), the block of the first two claims."""

    config: DecoderConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, x):
        norm = remat_lean(Norm, self.remat)
        block = lambda mdl, x: x + Mlp(self.config, self.remat, name="mlp")(norm(name="norm")(x))
        return (nn.remat(block) if self.remat == "full" else block)(self, x)


def gated_mlp(method: str, remat: str = "none") -> tuple[Callable, Any, Any, jax.ShapeDtypeStruct]:
    """(loss of what trains, what is frozen, and x; the first two of these; x [T, D]) in shapes."""
    config = DecoderConfig(256, 256, 1024, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64)
    block, x = GatedMlp(config, remat), jax.ShapeDtypeStruct((2048, 256), jnp.float32)
    # The same rank for both, as in the specification.
    made = rules(method, 4 if method == "paca" else 8, r"mlp/.*/kernel")
    shape = lambda key, x: adapt(key, block.init(key, x)["params"], made)
    trainable, frozen = partition(jax.eval_shape(shape, jax.random.key(0), x))
    # Weights in place, as in a training step.
    loss = lambda t, f, x: jnp.sum(block.apply({"params": in_place(combine(t, f))}, x))
    return loss, trainable, frozen, x


def residuals(method: str, remat: str) -> list[dict[str, Any]]:
    """Arrays that the block's backward pass keeps besides arguments: shape, bytes, origin."""
    kept = saved_residuals(*gated_mlp(method, remat))
    return [
        {"shape": list(a.shape), "bytes": a.size * a.dtype.itemsize, "from": where}
        for a, where in kept
        if "from the argument" not in where and a.size > 1
    ]


def products(method: str) -> int:
    """Matrix products in the forward pass of the block."""
    loss, *arguments = gated_mlp(method)
    return jax.jit(loss).lower(*arguments).as_text().count("stablehlo.dot_general")


def compare(config: Config, task: Task) -> dict[str, Any]:
    """Losses on the test split by seed, each method at the rate that validation chose."""
    objective = supervised(task.model.forward)
    eval_step = train.make_eval_step(objective)
    # As a function of dense params, so that one program serves all methods.
    score = lambda params, batches: train.evaluate(
        eval_step, merge(params), batches, mesh=task.mesh
    )["loss"]
    grid = [config.learning_rate * factor for factor in ((1,) if config.smoke else (1, 3, 10, 30))]
    seconds: dict[str, list[float]] = {}

    def tuned(method, rate, seed, batches):
        params, taken = fine_tune(config, task, objective, method, rate, seed)
        seconds.setdefault(method, []).append(taken)
        return score(params, batches)

    # A seed that no reported result uses.
    tuning = {
        method: {rate: tuned(method, rate, config.seeds, task.validation) for rate in grid}
        for method in METHODS
    }
    best = {method: min(losses, key=losses.get) for method, losses in tuning.items()}
    best |= dict.fromkeys(SELECTIONS, best["paca"])
    runs = [
        {method: tuned(method, rate, seed, task.test) for method, rate in best.items()}
        for seed in range(config.seeds)
    ]
    return {
        "zero_shot": score(task.params, task.test),
        "validation": {m: {f"{r:g}": v for r, v in losses.items()} for m, losses in tuning.items()},
        "learning_rates": best,
        "parameters": {m: count(_adapted(config, task, m, 0))[0] for m in METHODS},
        "step_seconds": {m: statistics.median(values) for m, values in seconds.items()},
        "test": runs,
    }


def fine_tune(config, task, objective, method: str, rate: float, seed: int) -> tuple[Any, float]:
    """The params after `config.steps` steps, and the median seconds of a step (which is only reported)."""
    optimizer = train.make_optimizer(rate, total_steps=config.steps, warmup_ratio=0.05)
    ticks: list[float] = []
    state, history = train.fit(
        _adapted(config, task, method, seed),
        objective,
        optimizer,
        task.batches(seed),
        steps=config.steps,
        microbatches=config.microbatches,
        mesh=task.mesh,
        callbacks=[lambda row: ticks.append(time.perf_counter())],
    )
    taken = statistics.median(np.diff(ticks))
    print(
        f"{method:14} rate {rate:<6g} seed {seed}  loss {history[-1]['loss']:.3f}  "
        f"{taken * 1e3:.0f} ms a step",
        flush=True,
    )
    return state.params, float(taken)


def _adapted(config, task, method, seed):
    adapted = adapt(jax.random.key(seed), task.params, rules(method, config.rank))
    return float32_masters(adapted)


def judge(metrics: dict[str, Any]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    kept = {r: {m: _megabytes(x) for m, x in by.items()} for r, by in metrics["residuals"].items()}
    products, quality = metrics["products"], metrics["quality"]
    runs, zero = quality["test"], quality["zero_shot"]
    behind = [row["paca"] / row["lora"] - 1 for row in runs]
    share = [(zero - row["paca"]) / (zero - row["lora"]) for row in runs]
    choice = {s: [row[s] / row["paca"] - 1 for row in runs] for s in SELECTIONS}
    table = ", ".join(f"{m} {kept['lean'][m]:.1f} ({kept['none'][m]:.1f})" for m in METHODS)
    less = lambda r: kept[r]["paca"] / kept[r]["lora"]
    worst_loss = max(row[m] for row in runs for m in METHODS) / zero
    beside = len(full_width_only_in(metrics["residuals"]["lean"]))
    count = functools.partial(Number, style="d")
    return [
        Claim(
            "fewer activations are kept (MB of a gated MLP, lean; in brackets: all kept)",
            "16 % less memory than LoRA",
            [
                Number(less("lean"), "below", 0.85, label="of LoRA's"),
                Number(less("none"), "below", 0.85, label="all kept, of LoRA's"),
                count(beside, "equal to", 0, label="arrays only for a weight's gradient:"),
            ],
            table,
        ),
        Claim(
            "no further products in the forward pass (base, PaCA, LoRA)",
            "none; LoRA has two more a layer",
            [
                count(products["paca"], "equal to", products["base"], label="PaCA"),
                count(
                    products["lora"] // 3, "equal to", products["base"], label="a third of LoRA's"
                ),
            ],
            f"{products['base']}, {products['paca']}, {products['lora']}",
        ),
        Claim(
            "test loss within 3 % of LoRA's at its best rate (relative gap)",
            "comparable",
            [mean(behind, "at most", 0.03)],
        ),
        Claim(
            "improvement over zero-shot, as a share of LoRA's, is at least 0.7",
            "comparable",
            [
                mean(share, "at least", 0.7),
                Number(worst_loss, "below", 0.98, label="largest loss of all, of zero-shot's"),
            ],
            f"zero-shot {zero:.3f}, PaCA {show([row['paca'] for row in runs])}, "
            f"LoRA {show([row['lora'] for row in runs])}, full {show([row['full'] for row in runs])}",
        ),
        Claim(
            "which inputs are chosen does not matter (gap of norm rules to random)",
            "no rule is better",
            [
                mean(gaps, "within", (-0.03, 0.03), label=name.removesuffix("_norm"))
                for name, gaps in choice.items()
            ],
        ),
    ]


def full_width_only_in(lean: dict[str, list], method: str = "paca") -> list[list[int]]:
    """Shapes that PaCA keeps and that are as wide as an input of a linear, except gate, up and x.

    Under "lean" the frozen block itself needs gate and up [T, F] for the activation's gradient;
    anything more of that width, or of the width of x, would be there only for a weight's gradient.
    """
    shapes = [row["shape"] for row in lean[method]]
    wide = [s for s in shapes if s == [2048, 1024]][2:]
    return wide + [s for s in shapes if s == [2048, 256]]


def print_residuals(by_remat: dict[str, dict[str, list]]) -> None:
    """The list per operation, not just its sum."""
    for remat, by_method in by_remat.items():
        for method, rows in by_method.items():
            print(f"\nkept by {method}, remat {remat}: {_megabytes(rows):.2f} MB")
            for row in rows:
                where = row["from"].rsplit("/", 1)[-1]
                print(f"  {row['bytes'] / 1e6:7.2f} MB {row['shape']!s:14} {where}")


def _megabytes(rows):
    return sum(row["bytes"] for row in rows) / 1e6


def _sized(config):
    if config.preset == "full":
        # The paper's instruction tuning: rank 64, batches of 16, one epoch.
        config = dataclasses.replace(
            config, model="meta-llama/Meta-Llama-3-8B", data="timdettmers/openassistant-guanaco",
            eval_data="timdettmers/openassistant-guanaco?split=test", rank=32, steps=615,
            microbatches=4, length=512, learning_rate=5e-4,
        )  # fmt: skip
    elif config.model:
        config = dataclasses.replace(config, batch_size=min(config.batch_size, 4), length=384)
    if config.smoke:
        config = dataclasses.replace(
            config, seeds=1, pretrain_steps=3, steps=2, layers=1, batch_size=4, length=32, rank=2
        )
    return config


def _figure(metrics, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (remat, by) in enumerate(metrics["residuals"].items()):
        places = np.arange(len(METHODS)) + 0.27 * (i - 1)
        left.bar(places, [_megabytes(by[m]) for m in METHODS], 0.25, label=f"remat {remat}")
    left.set_xticks(range(len(METHODS)), METHODS)
    left.set(ylabel="MB kept, gated MLP")
    left.legend(fontsize=8)
    quality = metrics["quality"]
    names = list(quality["test"][0])
    values = np.array([[row[name] for name in names] for row in quality["test"]])
    right.plot(np.arange(len(names)) + 0.15, values.T, "o", color="#4477aa", markersize=4)
    means, low, _ = intervals(values)
    right.errorbar(np.arange(len(names)), means, means - low, fmt="k_", capsize=4)
    right.axhline(quality["zero_shot"], color="gray", linestyle=":", label="zero-shot")
    right.set_xticks(range(len(names)), [n.replace("_", "\n") for n in names])
    right.set(ylabel="test loss, nats per token")
    right.legend(fontsize=8)
    figure.savefig(output / "paca.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
