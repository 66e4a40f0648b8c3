"""Monarch: Expressive Structured Matrices for Efficient and Accurate Training (arXiv 2204.00595).

Four claims at a size for two CPU cores: the projection is optimal and holds classical transforms; a
Monarch matrix learns a transform that a low-rank matrix of the same size cannot; networks trained
sparse, or sparse and then dense, come close to dense ones; and a projected dense network is a better
start than a random one.

    python experiments/papers/monarch.py
    python experiments/papers/monarch.py --model smollm2     also projects the MLP kernels of SmolLM2

The data are scikit-learn's digits, a third held out. The 90 % at which sparse turns dense is the paper's;
that the optimizer's state of the changed kernels starts afresh there is our choice. The random start of
the last claim is the reference code's, as in the specification; a variance-preserving one, which is a
stronger baseline (the projection is then some 4 points ahead, not more than 10), is reported beside it.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, Number, mean, show, worst
from experiments.lab.figures import bar_means
from experiments.lab.seeds import begin
from jaxft import train
from jaxft.adapters import (
    adapt,
    carry_state,
    densify,
    full,
    monarch,
    monarch_from_dense,
    partition,
)
from jaxft.metrics import Mean
from jaxft.weights import Blocks, matmul, monarch_project, monarch_weight, to_dense

HIDDEN = r"hidden_[12]/kernel"  # the paths of the two 256 x 256 kernels
CUT = {"inputs": 16, "outputs": 16, "rank": 1}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    steps: int = 600  # steps of training on digits
    transform_steps: int = 3000  # steps of learning the Fourier transform
    fine_tuning_steps: int = 60  # steps after the projection, on 300 examples
    dense_share: float = 0.1  # fraction of the steps that train dense after sparse
    learning_rate: float = 1e-3  # Adam's, for digits
    model: str | None = None  # also tabulate the projection of this model's MLP kernels
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/monarch"
    preset: Literal["small", "full"] = "small"  # full: 10 seeds, and SmolLM2's kernels
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    if config.preset == "full":
        config = dataclasses.replace(config, seeds=10, model=config.model or "smollm2")
    if config.smoke:
        config = dataclasses.replace(
            config, seeds=1, steps=20, transform_steps=20, fine_tuning_steps=5
        )
    metrics: dict[str, Any] = {"projection": projection()}
    metrics["transform"] = [learn_transform(config, seed) for seed in range(config.seeds)]
    metrics["digits"] = [digits(config, seed) for seed in range(config.seeds)]
    if config.model:
        metrics["kernels"] = kernel_errors(config.model)
    _figure(metrics, this.output)
    return this.finish(judge(metrics), metrics)


def projection() -> dict[str, float]:
    """Relative errors of projecting known matrices."""
    from scipy.linalg import dft, hadamard

    def error(matrix, blocks, rank=1):
        near = to_dense(monarch_project(matrix, Blocks(blocks, blocks, rank)))
        return float(jnp.linalg.norm(near - matrix) / jnp.linalg.norm(matrix))

    fourier = jnp.asarray(dft(16), jnp.complex64)
    order = np.arange(16).reshape(4, 4).T.ravel()
    gaussian = jax.random.normal(jax.random.key(0), (256, 256))
    return {
        "hadamard_64": error(jnp.asarray(hadamard(64), jnp.float32), 8),
        "dft_16_permuted": error(fourier[:, order].T, 4),
        "dft_16": error(fourier, 4),
        **{f"gaussian_256_rank_{rank}": error(gaussian, 16, rank) for rank in (1, 2, 4)},
    }


def learn_transform(config: Config, seed: int) -> dict[str, float]:
    """Relative squared errors of a Monarch and a low-rank matrix of 1024 numbers fitted to y = H x."""
    from scipy.linalg import hadamard

    target = jnp.asarray(hadamard(64), jnp.float32) / 8
    keys = jax.random.split(jax.random.key(seed), 4)
    low_rank = {
        "a": jax.random.normal(keys[0], (64, 8)) / 8,
        "b": jax.random.normal(keys[1], (8, 64)) / 8**0.5,
    }
    starts = {"monarch": monarch_weight(keys[2], (64, 64), Blocks(8, 8, 1)), "low_rank": low_rank}

    def objective(params, batch, key):
        w = params["w"]
        y = (batch["x"] @ w["a"]) @ w["b"] if isinstance(w, dict) else matmul(batch["x"], w)
        square = jnp.sum((y - batch["x"] @ target) ** 2)
        return square / batch["x"].size, {"loss": Mean(square, jnp.float32(batch["x"].size))}

    rng = np.random.default_rng(seed)
    batches = [{"x": rng.standard_normal((256, 64), np.float32)} for _ in range(50)]
    errors = {}
    for name, start in starts.items():
        rate = optax.cosine_decay_schedule(1e-2, config.transform_steps)
        params = fit({"w": start}, objective, optax.adam(rate), batches, config.transform_steps)
        w = params["w"]
        dense = w["a"] @ w["b"] if isinstance(w, dict) else to_dense(w)
        errors[name] = float(jnp.sum((dense - target) ** 2) / jnp.sum(target**2))
    return errors


def digits(config: Config, seed: int) -> dict[str, float]:
    """Held-out accuracies of dense, sparse, sparse-then-dense and dense-then-sparse training."""
    training, held_out = split(seed)
    rng = np.random.default_rng(seed)
    draw = lambda n: [
        jax.tree.map(lambda a, r=rows: a[r], training)
        for rows in rng.integers(0, n, (100, min(64, n)))
    ]
    batches, few = draw(len(training["y"])), draw(300)
    optimizer = optax.adam(config.learning_rate)
    score = lambda params: float(
        jnp.mean(jnp.argmax(mlp(params, held_out["x"]), 1) == held_out["y"])
    )
    key = jax.random.key(seed)
    start = init(key)
    rest = {".*": full()}
    sparse_start = adapt(key, start, {HIDDEN: monarch(init="variance_preserving", **CUT)} | rest)

    dense = fit(start, objective, optimizer, batches, config.steps)
    switch = round(config.steps * (1 - config.dense_share))
    state = fit_state(sparse_start, objective, optimizer, batches, switch)
    sparse = fit(sparse_start, objective, optimizer, batches, config.steps)
    turned = densify(state.params)
    opt_state = carry_state(state.opt_state, optimizer.init(partition(turned)[0]))
    state = train.TrainState(state.step, turned, opt_state, state.carry, state.key)
    turned = advance(state, objective, optimizer, batches, config.steps - switch).params

    projected = adapt(key, dense, {HIDDEN: monarch_from_dense(**CUT)} | rest)
    tune = lambda params: fit(params, objective, optimizer, few, config.fine_tuning_steps)
    reference = adapt(key, start, {HIDDEN: monarch(**CUT)} | rest)
    models = {
        "dense": dense, "sparse": sparse, "sparse_to_dense": turned, "projected": projected,
        "projected_tuned": tune(projected), "random_tuned": tune(reference),
        "random_variance_preserving_tuned": tune(sparse_start),
    }  # fmt: skip
    return {name: score(params) for name, params in models.items()}


def kernel_errors(name: str) -> list[dict[str, Any]]:
    """Relative projection errors of each MLP kernel of a model, 4 blocks, at rank 48 and half of it."""
    from jaxft.checkpoints import load_model
    from jaxft.weights import monarch_blocks

    _, params = load_model(name)
    rows = []
    for layer, block in params["layers"].items():
        for kind, part in block["mlp"].items():
            kernel = part["kernel"]
            cut = monarch_blocks(kernel.shape, blocks=4)
            near = to_dense(monarch_project(kernel, cut))
            error = float(jnp.linalg.norm(near - kernel) / jnp.linalg.norm(kernel))
            rows.append({"layer": int(layer), "kernel": kind, "relative_error": error})
    return rows


def judge(metrics: dict[str, Any]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    exact, fits, runs = metrics["projection"], metrics["transform"], metrics["digits"]
    column = lambda rows, name: [row[name] for row in rows]
    gap = lambda a, b: [row[a] - row[b] for row in runs]
    learnt, low = column(fits, "monarch"), column(fits, "low_rank")
    ahead = gap("projected_tuned", "random_tuned")
    stronger = gap("projected_tuned", "random_variance_preserving_tuned")
    error = lambda name, label: Number(exact[name], "below", 1e-5, label=label, style=".0e")
    # One seed has no interval, and only its gap is judged.
    sure = [mean(ahead, "above", 0.0)] * (len(ahead) > 1)
    return [
        Claim(
            "the projection holds transforms exactly (relative error)",
            "Hadamard 0, DFT 0 after a permutation",
            [error("hadamard_64", "Hadamard"), error("dft_16_permuted", "DFT")],
        ),
        Claim(
            "it learns y = Hx; low rank of the same size cannot (squared error)",
            "expressive",
            [
                worst(learnt, "below", 1e-4, style=".1e"),
                worst(low, "above", 0.8, label="low rank, best seed"),
            ],
        ),
        Claim(
            "sparse training is within 2 points of dense (accuracy gap)",
            "equal quality",
            [mean(gap("sparse", "dense"), "above", -0.02, by="estimate")],
        ),
        Claim(
            "sparse, then dense for the last steps, is too",
            "equal quality, 2x faster",
            [mean(gap("sparse_to_dense", "dense"), "above", -0.02, by="estimate")],
        ),
        Claim(
            "a projected dense model fine-tunes better than a random sparse one",
            "1.7x faster at comparable score",
            [mean(ahead, "above", 0.1, by="estimate"), *sure],
            f"variance-preserving start {show(stronger)}",
        ),
    ]


def split(seed: int):
    """(training, held-out) digits as {"x" [N, 64] in 0..1, "y" [N]}; one in three is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    cut = len(order) * 2 // 3
    part = lambda rows: {
        "x": (data.data[rows] / 16).astype(np.float32),
        "y": data.target[rows].astype(np.int32),
    }
    return part(order[:cut]), part(order[cut:])


def init(key: jax.Array) -> dict[str, Any]:
    """Params of an MLP 64-256-256-256-10."""
    sizes = [64, 256, 256, 256, 10]
    keys = jax.random.split(key, 4)
    return {
        f"hidden_{i}": {
            "kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)
        }
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }  # fmt: skip


def mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits [N, 10]."""
    for i in range(4):
        layer = params[f"hidden_{i}"]
        x = matmul(x, layer["kernel"]) + to_dense(layer["bias"])[None]
        x = jax.nn.relu(x) if i < 3 else x
    return x


def objective(params, batch, key):
    """Cross-entropy of digits."""
    losses = optax.softmax_cross_entropy_with_integer_labels(mlp(params, batch["x"]), batch["y"])
    loss = Mean(jnp.sum(losses), jnp.float32(losses.size))
    return loss.value, {"loss": loss}


def fit(params, objective, optimizer, batches, steps):
    """The params after `steps` steps over `batches` again and again."""
    return fit_state(params, objective, optimizer, batches, steps).params


def fit_state(params, objective, optimizer, batches, steps) -> train.TrainState:
    """The same with the optimizer's state."""
    # Compiled steps write into their state; others start from these params too.
    state = train.init_state(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
    return advance(state, objective, optimizer, batches, steps)


def advance(state, objective, optimizer, batches, steps) -> train.TrainState:
    """`fit` starts from params; turning dense in mid-run needs to start from a state."""
    step = train.jit_step(train.make_step(objective, optimizer))
    for i in range(steps):
        state, _ = step(state, batches[i % len(batches)])
    return state


def _figure(metrics, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(metrics["digits"][0])
    values = np.array([[row[name] for name in names] for row in metrics["digits"]])
    bar_means(left, [n.replace("_", " ") for n in names], values)
    left.set(xlabel="held-out accuracy on digits", xlim=(0, 1))
    gaussian = {k: v for k, v in metrics["projection"].items() if k.startswith("gaussian")}
    right.plot([1, 2, 4], list(gaussian.values()), "o-", color="#aa3377")
    right.set(xlabel="rank of slices", ylabel="relative error", title="projection of noise")
    figure.savefig(output / "monarch.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
