"""Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (arXiv 2012.13255).

Fine-tuning inside a random subspace of d dimensions, W_i + lam_i (P theta)_i, and d90, the smallest d that
keeps 90 % of full fine-tuning's score: pretraining lowers it, more pretraining lowers it further, scales
lam for each tensor (SAID) do not raise it, and it does not grow with the model.

    python experiments/papers/intrinsic_dimension/main.py
    python experiments/papers/intrinsic_dimension/main.py --model minilm     also a transformer (an hour)
    python experiments/papers/intrinsic_dimension/main.py --preset full      RoBERTa on MRPC, d to 10,000

The small scale: an MLP learns ten digits, then, with a new head, odd or even from 300 other examples. All
tensors lie in the subspace, the head too. d counts lam. Each score is held-out accuracy at the learning rate
that was best on a validation set; "full" is the same budget of steps and rates without a subspace.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import math
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from scipy import stats

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, Number, show
from experiments.lab.figures import plot_band
from experiments.lab.seeds import begin
from experiments.papers.intrinsic_dimension import text
from jaxft import train
from jaxft.adapters import intrinsic, intrinsic_apply
from jaxft.analysis import d90_search, satisfactory
from jaxft.metrics import Mean

HIDDEN = 64  # units, where the width is not what is measured
RATES = (1e-2, 3e-2, 1e-1)  # of Adam, in the subspace
FULL_RATES = (1e-3, 3e-3, 1e-2)
CHANCE = 0.5
PARTS = {"main": {}, "minilm": {"model": "minilm"}}  # parts of the record


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    steps: int = 600  # steps of fine-tuning
    # steps of pretraining; the last is "pretrained"
    checkpoints: tuple[int, ...] = (0, 50, 200, 1000)
    widths: tuple[int, ...] = (32, 64, 128, 256)  # hidden units
    grid: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)  # dimensions
    batch_size: int = 50  # examples per step
    model: str | None = None  # also tune this transformer: minilm, smollm2, a directory or hub id
    tuning: text.Settings = text.Settings()  # of that transformer
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/intrinsic_dimension"
    preset: Literal["small", "full"] = "small"  # full: the paper's own setting for the transformer
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config, PARTS)
    if config.preset == "full":
        paper = dict(model=config.model or "FacebookAI/roberta-base", tuning=text.PAPER)
        config = dataclasses.replace(config, **paper)
    if config.smoke:
        small = dict(steps=4, checkpoints=(0, 4), widths=(HIDDEN,), grid=(8, 16), seeds=2)
        config = dataclasses.replace(config, **small, tuning=text.SMOKE)
    metrics = measure(config)
    if config.model:
        metrics["text"] = text.measure(config.model, config.tuning)
    _figure(config, metrics, this.output)
    claims = judge(metrics)
    # The first claims are in the record of the run without a transformer.
    return this.finish(claims, metrics, claims[-1:] if config.model else None)


def measure(config: Config) -> dict[str, Any]:
    """Scores at each d and d90 for starts, methods, checkpoints and widths."""
    data = stack([split(seed) for seed in range(config.seeds)])
    starts = pretrain(config, data, HIDDEN)
    first, last = min(starts), max(starts)
    metrics: dict[str, Any] = {"curves": {}, "pretraining": {}, "widths": {}}
    for name, step in (("pretrained", last), ("random", first)):
        for method in ("DID", "SAID"):
            found = curve(config, data, starts[step], method, whole=True)
            metrics["curves"][f"{name} {method}"] = found
            print(f"{name}, {method}: d90 {found['d90']}, d95 {found['d95']}", flush=True)
    for step, start in starts.items():
        known = {first: "random DID", last: "pretrained DID"}.get(step)
        found = metrics["curves"][known] if known else curve(config, data, start, "DID")
        metrics["pretraining"][str(step)] = found["d90"]
        print(f"{step} steps of pretraining: d90 {found['d90']}", flush=True)
    for width in config.widths:
        start = starts[last] if width == HIDDEN else pretrain(config, data, width)[last]
        same = width == HIDDEN
        found = metrics["curves"]["pretrained DID"] if same else curve(config, data, start, "DID")
        metrics["widths"][str(width)] = {"D": found["D"], "d90": found["d90"]}
        print(f"width {width}: D {found['D']}, d90 {found['d90']}", flush=True)
    return metrics


def curve(config: Config, data, start, method, whole: bool = False) -> dict[str, Any]:
    """Scores by d and where they reach 90 % of full fine-tuning; `whole`: on all of the grid, and 95 %."""
    m = len(jax.tree.leaves(start))
    scales = m if method == "SAID" else 0
    full = fine_tune(config, data, start, None, 0, FULL_RATES).tolist()
    run = functools.cache(
        lambda d: fine_tune(config, data, start, method, d - scales, RATES).tolist()
    )
    grid = [d for d in config.grid if d > scales]
    search = lambda **target: d90_search(
        lambda d, _: run(d), grid, satisfactory(float(np.median(full)), **target),
        range(config.seeds), resolution=1.2,
    )  # fmt: skip
    found = {"d90": search()}
    if whole:
        found |= {"d95": search(share=0.95), "d90_above_chance": search(floor=CHANCE)}
    tried = set(grid if whole else ()).union(*(part.scores for part in found.values()))
    return {
        **{name: part.d for name, part in found.items()},
        "full": full,
        "scores": {str(d): run(d) for d in sorted(tried)},
        "D": sum(leaf[0].size for leaf in jax.tree.leaves(start)),
        "m": m,
    }


@functools.partial(jax.jit, static_argnums=(0, 3, 5))
def fine_tune(config: Config, data, starts, method, size, rates) -> jax.Array:
    """Held-out accuracy [seeds] of learning odd or even, at the rate that validated best.

    One program serves every d: a map from fewer numbers is that from more on the first `size` of
    them. method None: without a subspace.
    """
    task = {name: part | {"y": part["y"] % 2} for name, part in data.items()}
    most, said = max(config.grid), method == "SAID"

    def lane(rate, start, task, key):
        map_key, batch_key = jax.random.split(key)
        params, read = start, lambda params: params
        if method:
            d = most + len(jax.tree.leaves(start)) * said
            params = intrinsic(map_key, start, d, said=said)
            inside = jnp.arange(most) < size
            read = lambda p: intrinsic_apply(dataclasses.replace(p, theta=p.theta * inside))
        optimizer = optax.adam(rate)
        state = train.init_state(params, optimizer, key)
        state = advance(config, batch_key, task["training"], optimizer, read, state, config.steps)
        params = read(state.params)
        return accuracy(params, task["validation"]), accuracy(params, task["test"])

    keys = jax.random.split(jax.random.key(1), config.seeds)
    lanes = jax.vmap(lane, (0, None, None, None))
    validation, test = jax.vmap(lanes, (None, 0, 0, 0))(jnp.array(rates), starts, task, keys)
    best = jnp.argmax(validation, axis=1)
    return jnp.take_along_axis(test, best[:, None], axis=1)[:, 0]


def pretrain(config: Config, data, width: int) -> dict[int, Any]:
    """{steps of pretraining on ten digits: params [seeds, ...] with a new head for two classes}."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    optimizer = optax.adam(1e-3)
    begin = lambda key: train.init_state(init(key, width, 10), optimizer, key)
    state, found, done = jax.vmap(begin)(keys), {}, 0
    heads = jax.vmap(lambda key: init(jax.random.fold_in(key, 1), width, 2)["head"])(keys)
    for step in sorted(config.checkpoints):
        more = lambda state, part, key, n=step - done: advance(
            config, jax.random.fold_in(key, n), part, optimizer, lambda params: params, state, n
        )
        state, done = jax.jit(jax.vmap(more))(state, data["pretraining"], keys), step
        found[step] = state.params | {"head": heads}
    return found


def advance(config: Config, key, part, optimizer, read, state, steps: int) -> train.TrainState:
    """The state after `steps` steps on random batches of `part`; the MLP gets read(params)."""

    def objective(params, batch, key):
        logits = mlp(read(params), batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        loss = Mean(jnp.sum(losses), jnp.float32(losses.size))
        return loss.value, {"loss": loss}

    step = train.make_step(objective, optimizer)
    rows = jax.random.randint(key, (steps, config.batch_size), 0, len(part["y"]))
    one = lambda state, rows: (step(state, jax.tree.map(lambda a: a[rows], part))[0], None)
    # A scan over `make_step` rather than `fit`: seeds and rates are vmapped.
    return jax.lax.scan(one, state, rows)[0]


def init(key: jax.Array, width: int, classes: int) -> dict[str, Any]:
    """Params of an MLP 64-width-width-classes."""
    keys, sizes = jax.random.split(key, 3), [64, width, width, classes]
    layer = lambda key, a, b: {
        "kernel": jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)
    }  # fmt: skip
    names = ("hidden_0", "hidden_1", "head")
    return {n: layer(k, a, b) for n, k, a, b in zip(names, keys, sizes, sizes[1:], strict=False)}


def mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits [N, classes]."""
    for name in ("hidden_0", "hidden_1", "head"):
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        x = x if name == "head" else jax.nn.relu(x)
    return x


def accuracy(params, part) -> jax.Array:
    """Fraction of correct labels."""
    return jnp.mean(jnp.argmax(mlp(params, part["x"]), 1) == part["y"])


def split(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Digits x [N, 64] in 0..1, y [N]: test 599, training 300, validation 200, pretraining the rest."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    parts = np.split(order, [599, 899, 1099])
    names = ("test", "training", "validation", "pretraining")
    part = lambda rows: {
        "x": np.float32(data.data[rows] / 16), "y": data.target[rows].astype(np.int32)
    }  # fmt: skip
    return {name: part(rows) for name, rows in zip(names, parts, strict=True)}


def judge(metrics: dict[str, Any]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    curves = metrics["curves"]
    gaps = {
        f"{method} {d}": np.subtract(scores, curves[f"random {method}"]["scores"][d])
        for method in ("DID", "SAID")
        for d, scores in curves[f"pretrained {method}"]["scores"].items()
        if d in curves[f"random {method}"]["scores"]
    }
    behind = [name for name, gap in gaps.items() if gap.mean() < 0]
    widest = max(gaps, key=lambda name: gaps[name].mean())
    pairs = {
        name: (curves[f"{name} SAID"], curves[f"{name} DID"]) for name in ("pretrained", "random")
    }
    steps, widths = metrics["pretraining"], metrics["widths"]
    rho = spearman(steps)
    slope = exponent(widths)
    ratio = lambda name, key: (
        at(curves[f"random {name}"][key]) / at(curves[f"pretrained {name}"][key])
    )
    claims = [
        Claim(
            "at equal d a pretrained start is ahead of a random one (accuracy gap)",
            "pretraining lowers d90",
            [Number(len(behind), "below", 2, label="behind at", style="d", unit=f"of {len(gaps)}")],
            f"largest gap {show(gaps[widest])} at {widest}",
        ),
        Claim(
            "d95 from a pretrained start is at most half of a random one's",
            "pretraining lowers d90",
            [
                Number(ratio(m, "d95"), "at least", 2, label=f"{m}:", style=".1f", unit="times lower")
                for m in ("DID", "SAID")
            ],
            ", ".join(f"{m}: {line(curves, m, 'd95')}" for m in ("DID", "SAID")),
        ),
        Claim(
            "d90 falls along pretraining (rank correlation with steps)",
            "falls for all of 6 tasks",
            [Number(rho, "at most", -0.8 + 1e-9, style=".2f")],
            "d90 " + ", ".join(f"{shown(d)} after {step}" for step, d in steps.items()),
        ),
        Claim(
            "d90 of SAID is at most one grid step (a factor 2) above DID's",
            "MRPC, RoBERTa-base: 896, DID 1000",
            [
                Number(
                    at(said["d90"]) / at(did["d90"]), "at most", 2, label=f"{name}:", style=".2f",
                    unit="times",
                )
                for name, (said, did) in pairs.items()
            ],
            ", ".join(
                f"{name}: {shown(said['d90'])}, DID {shown(did['d90'])}"
                for name, (said, did) in pairs.items()
            ),
        ),
        Claim(
            "d90 does not grow with the model (exponent of d90 in D, at most 1/4)",
            "MRPC, RoBERTa: base 896, large 207",
            [Number(slope, "at most", 0.25, style=".2f")],
            "d90 " + ", ".join(f"{shown(w['d90'])} of {w['D']:,}" for w in widths.values()),
        ),
    ]  # fmt: skip
    if "text" in metrics:
        found = metrics["text"]
        claims.append(
            Claim(
                f"a transformer of {found['D']:,} numbers keeps 90 % of full fine-tuning with d = 1000",
                "MRPC, RoBERTa-base: d90 896",
                [Number(at(found["d90"]), "at most", 1000, label="d90", style=".0f")],
                f"full {show(found['full'])}, before {found['before']:.3f}",
            )
        )
    return claims


def spearman(steps: dict[str, int | None]) -> float:
    """Rank correlation of d90 with steps of pretraining; 0 if all d90 are equal."""
    found = [at(d) for d in steps.values()]
    if len(set(found)) < 2:
        return 0.0
    return float(stats.spearmanr([int(step) for step in steps], found).statistic)


def exponent(widths: dict[str, dict[str, int | None]]) -> float:
    """b of d90 ~ D^b by least squares in logarithms; infinite if a d90 was not reached, NaN of one width."""
    found = [at(w["d90"]) for w in widths.values()]
    if math.inf in found:
        return math.inf
    if len(found) < 2:
        return math.nan
    return float(np.polyfit(np.log([w["D"] for w in widths.values()]), np.log(found), 1)[0])


def at(d: int | None) -> float:
    """A d90 that the grid did not reach is infinite."""
    return math.inf if d is None else d


def shown(d: int | None) -> str:
    """d90 as text."""
    return "not reached" if d is None else str(d)


def line(curves, method, key) -> str:
    """d of a pretrained and a random start as text."""
    first, second = (shown(curves[f"{start} {method}"][key]) for start in ("pretrained", "random"))
    return f"{first}, random {second}"


def stack(parts: list[Any]) -> Any:
    """The trees as one with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def _figure(config, metrics, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, found in metrics["curves"].items():
        d = [int(d) for d in found["scores"]]
        values = np.array(list(found["scores"].values()))
        style = "-" if name.startswith("pretrained") else "--"
        color = "#4477aa" if name.endswith(" DID") else "#aa3377"
        plot_band(left, d, values.T, style, color=color, label=name)
    left.set(xscale="log", xlabel="d", ylabel="held-out accuracy")
    left.legend(fontsize="small")
    middle.plot(
        list(metrics["pretraining"]), [at(d) for d in metrics["pretraining"].values()], "o-"
    )
    middle.set(xlabel="steps of pretraining", ylabel="d90")
    sizes = [w["D"] for w in metrics["widths"].values()]
    right.plot(sizes, [at(w["d90"]) for w in metrics["widths"].values()], "o-")
    right.set(xscale="log", xlabel="D, numbers of the model", ylabel="d90", ylim=(0, None))
    right.set_xticks(sizes, [f"{size:,}" for size in sizes])
    right.minorticks_off()  # their labels would overlap
    figure.savefig(output / "intrinsic_dimension.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
