"""OTR: One-Token Rollout, Guiding Supervised Fine-Tuning with Policy Gradient (arXiv 2509.26313).

Each token of supervised data is a bandit of one step: candidates are drawn from the model itself, the
reference token has reward 1 and any other token a slightly negative reward. Tokens that the model finds
impossible are then hardly learned, and it should stay closer to the start than with plain fine-tuning (SFT).

    python experiments/papers/otr.py
    python experiments/papers/otr.py --methods sft dft otr otr_expected grpo --ablations

A model of 0.2 M parameters knows four tasks on words of five letters (copy, reverse, shift, capitals) and
half of a fifth, sorting, on which it is then tuned. SFT, DFT (each token weighs its own probability), OTR
and its expectation train on the same rows in the same order. They are compared where their accuracies of the
target are equal, between measurements. The start is one pretrained model: intervals are over the words to
train on, their order and the samples, not over starts.

Seeds 0 to 3, where the target is right at 0.9 (0.42 at first): OTR's KL to the start on the old tasks is
0.043 nats an answer, SFT's 0.059 (-0.016 [-0.026, -0.006]); the old tasks are right at 0.972 and 0.968
(+0.003 [0.001, 0.005]): small, and shown. On the target's own questions no difference in KL was shown
(-0.017 [-0.045, 0.011] of 1.16). OTR gets there in 169 steps, SFT in 202. DFT, and the expectation without
samples, cannot be distinguished from OTR; nor can OTR without negative rewards (its old tasks' accuracy is
higher by 0.0001 [-0.0018, 0.0019]) or with samples at temperature 1 (seeds 0 to 2, by which alone OTR's two
gains over SFT would not be shown either).

The learning rate does more than the method: on seeds 100 to 102, at the same point, the old tasks were right
at 0.38 (OTR) and 0.19 (SFT) with 1e-3, at 0.94 and 0.91 with 3e-4, at 0.970 and 0.965 with 1e-4, the default.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, mean, show
from experiments.lab.figures import plot_band
from experiments.lab.seeds import begin, measure_claims
from experiments.worlds import arithmetic
from experiments.worlds import toy_text as toy
from jaxft import losses, rl, train
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient, token_supervised
from jaxft.objectives.policy import token_mean
from jaxft.rl import prompts_of
from jaxft.rl.algorithms import clipped

LETTERS, LENGTH = 10, 5  # a word: five of the first ten tokens
CAPITALS = 10  # the same letters again
END, SIZE = 20, LENGTH + 1  # of an answer
TASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # words [B, 5] -> answers [B, 5]
    "copy": lambda words: words,
    "reverse": lambda words: words[:, ::-1],
    "shift": lambda words: (words + 1) % LETTERS,
    "capitals": lambda words: words + CAPITALS,
    "target": lambda words: np.sort(words, axis=1),
}
OLD = tuple(TASKS)[:-1]
VOCABULARY = END + 1 + len(TASKS)
METHODS = ("sft", "dft", "otr", "otr_expected", "grpo")
ABLATIONS = ("otr, β = 0", "otr, κ = 1")
MEASURES = ("kl target", "kl old", "old")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    methods: tuple[str, ...] = METHODS[:-1]  # the methods to compare
    ablations: bool = False  # also OTR without negative rewards, and with samples at temperature 1
    seeds: int = 4  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    start_seed: int = 0  # seed of the pretrained model from which all runs start
    until: float = 0.4  # accuracy on the target task at which pretraining ends
    share: float = 0.06  # fraction of the target task in pretraining
    levels: tuple[float, ...] = (0.7, 0.8, 0.9)  # target accuracies at which methods are compared
    judged: float = 0.9  # the level of the claims
    steps: int = 300  # steps of each method
    evaluate_every: int = 10  # steps between evaluations
    examples: int = 4000  # examples of the target task
    batch_size: int = 64  # examples per step
    learning_rate: float = 1e-4  # learning rate of all methods
    num_samples: int = 256  # K
    kappa: float = 1.3  # κ: temperature of the samples
    beta: float = -0.1  # β: reward of a sample that is not the data's token
    held_out: int = 200  # held-out words, for each task
    width: int = 96  # width of the model
    layers: int = 2  # layers of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/otr"
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    check(config)
    this = begin(config)
    if config.smoke:
        config = dataclasses.replace(
            config, methods=("sft", "otr"), seeds=1, until=1e-6, levels=(0.0,), judged=0.0, steps=2,
            evaluate_every=1, examples=32, batch_size=8, num_samples=4, held_out=8, learning_rate=3e-3,
            width=32, layers=1,
        )  # fmt: skip
    model, start = pretrained(config)
    measure = measures(config, model, start)
    first = measure(start) | {"step": 0}
    print(
        "start: " + ", ".join(f"{k} {v:.3f}" for k, v in first.items() if k != "step"), flush=True
    )

    def run_seed(seed):
        curves = {}
        for name in config.methods + ABLATIONS * config.ablations:
            curves[name] = [first, *train_method(config, model, start, name, seed, measure)]
            last = curves[name][-1]
            print(
                f"seed {seed}, {name}: target {last['target']:.3f}, old {last['old']:.3f}",
                flush=True,
            )
        return curves

    of = functools.partial
    return measure_claims(
        this, config, run_seed, judge=of(judge, config), print_table=of(print_table, config),
        figure=of(_figure, config),
    )  # fmt: skip


def check(config: Config) -> None:
    """Raises ValueError early for settings that would fail only after minutes."""
    unknown = set(config.methods) - set(METHODS)
    if unknown or not {"sft", "otr"} <= set(config.methods):
        raise ValueError(
            f"methods: sft and otr, and others of {METHODS}, are expected; got {config.methods}."
        )
    if config.judged not in config.levels:
        raise ValueError(f"judged: must be one of levels {config.levels}, got {config.judged}.")


def words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Different random words [count, 5]."""
    chosen = rng.choice(LETTERS**LENGTH, count, replace=False)
    return np.stack([chosen // LETTERS**i % LETTERS for i in range(LENGTH)], axis=1)


def questions(task: str, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(prompts [B, 6], answers [B, 6]): the task's token and the word; the answer and END."""
    column = lambda token: np.full((len(words), 1), token)
    prompts = [column(END + 1 + list(TASKS).index(task)), words]
    join = lambda columns: np.concatenate(columns, axis=1).astype(np.int32)
    return join(prompts), join([TASKS[task](words), column(END)])


def rows_of(*pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of prompts and answers, and `positions`, one after another."""
    prompts, answers = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    rows = jax.tree.map(np.asarray, toy.rows(jnp.asarray(prompts), jnp.asarray(answers)))
    return rows | {"positions": np.tile(np.arange(2 * SIZE, dtype=np.int32), (len(prompts), 1))}


def splits(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(known, held out): words to train on, and those of all measurements."""
    drawn = words(np.random.default_rng(config.start_seed), 20_000 + config.held_out)
    return drawn[config.held_out :], drawn[: config.held_out]


def pretrained(config: Config) -> tuple[Decoder, Any]:
    """(model, params): all tasks in one mixture, until the target has the probability `until`."""
    known, _ = splits(config)
    rng = np.random.default_rng(config.start_seed)
    model, params = arithmetic.small_model(
        jax.random.key(config.start_seed), config.width, 2 * SIZE, VOCABULARY, config.layers
    )
    rest = (1 - config.share) / len(OLD)
    names = rng.choice(list(TASKS), len(known), p=[rest] * len(OLD) + [config.share])
    rows = rows_of(*(questions(task, known[names == task]) for task in TASKS))
    some = rows_of(questions("target", known[:500]))
    right = jax.jit(lambda params: jnp.mean(jnp.exp(_log_probs(model, params, some))))
    params, steps = arithmetic.warm_start(
        model,
        params,
        rows,
        config.start_seed,
        until=config.until,
        measure=lambda p: float(right(p)),
    )
    print(f"{steps} steps of pretraining", flush=True)
    return model, params


def train_method(config, model, start, name, seed, measure) -> list[dict]:
    """Trains one method; returns the measurements along the run."""
    known, _ = splits(config)
    examples = known[np.random.default_rng(seed).permutation(len(known))[: config.examples]]
    prompts, answers = questions("target", examples)
    if name == "grpo":
        build = functools.partial(policy_gradient, model.forward)
        objective = build(clipped(), token_mean)
        batches = rl.collect_on_device(
            model, rl.Prompts(prompts.tolist(), 32, seed=seed), rl.equals(answers.tolist(), SIZE),
            rl.grpo(build, 8).credit, SamplingConfig(SIZE, stop_ids=(END,)), group_size=8,
        )  # fmt: skip
    else:
        loss, metrics = token_losses(config)[name]
        objective = token_supervised(model.forward, loss, metrics)
        batches = epochs(rows_of((prompts, answers)), seed, config.batch_size)
    _, history = train.fit(
        start,
        objective,
        arithmetic.policy_optimizer(config.learning_rate),
        batches,
        steps=config.steps,
        key=jax.random.key(seed),
        callbacks=[train.every(config.evaluate_every, lambda state: measure(state.params))],
    )
    names = ("step", "target", *MEASURES, "hit_rate", "missed")
    return [{k: row[k] for k in names if k in row} for row in history if "target" in row]


def epochs(rows: dict[str, np.ndarray], seed: int, batch_size: int) -> Iterator[dict]:
    """Endless batches of rows, each row once an epoch."""
    count = len(rows["tokens"])
    for draw in itertools.count():
        chosen = prompts_of(draw, batch_size, count, seed)
        yield jax.tree.map(lambda x, chosen=chosen: x[chosen], rows)


def token_losses(config: Config) -> dict[str, tuple[Callable, Callable | None]]:
    """name -> (loss, metrics) of `token_supervised`."""
    otr = dict(num_samples=config.num_samples, kappa=config.kappa)
    sampled = lambda beta, **changed: (
        functools.partial(losses.otr_loss, beta=beta, **otr | changed),
        functools.partial(losses.otr_metrics, **otr | changed),
    )
    expected = functools.partial(losses.otr_expected_loss, kappa=config.kappa, beta=config.beta)
    cross_entropy = losses.cross_entropy
    return {
        "sft": (lambda key, logits, targets, mask: cross_entropy(logits, targets), None),
        "dft": (
            lambda key, logits, targets, mask: losses.dft_loss(-cross_entropy(logits, targets)),
            None,
        ),
        "otr": sampled(config.beta),
        "otr_expected": (lambda key, logits, targets, mask: expected(logits, targets), None),
        "otr, β = 0": sampled(0.0),
        "otr, κ = 1": sampled(config.beta, kappa=1.0),
    }


def measures(config: Config, model: Decoder, start: Any) -> Callable[[Any], dict[str, float]]:
    """Returns measure(params): accuracies of held-out words, and KL to the start in nats an answer.

    `target` and `old`: the probability of the right answer, the latter over all old tasks. KL(π || start) is
    along one answer of π to each question, with the whole distribution at each of its tokens.
    """
    _, held_out = splits(config)
    pairs = [questions(task, held_out) for task in TASKS]
    rows, prompts = rows_of(*pairs), jnp.concatenate([jnp.asarray(p) for p, _ in pairs])
    sample = toy.sampler(model, SIZE, END)

    @jax.jit
    def values(params, start, completions, mask):
        batch = toy.rows(prompts, completions, mask)
        here, there = (_logits(model, p, batch) for p in (params, start))
        kl = jnp.sum(losses.reverse_kl_divergence(there, here) * mask, axis=1)
        right = jnp.exp(_log_probs(model, params, rows))
        return [x.reshape(len(TASKS), -1).mean(axis=1) for x in (right, kl)]

    def measure(params):
        completions, mask, _ = sample(params, prompts, jax.random.key(config.start_seed))
        right, kl = map(np.asarray, values(params, start, completions, mask))
        found = {"target": right[-1], "kl target": kl[-1]}
        found |= {"old": right[:-1].mean(), "kl old": kl[:-1].mean()}
        return {name: float(value) for name, value in found.items()}

    return measure


def at_level(curve: list[dict], level: float) -> dict[str, float]:
    """Interpolates the measurements to where the target's accuracy first reaches `level`.

    NaN if it is never reached; the first row if that already reaches it.
    """
    if curve[0]["target"] >= level:
        return {name: curve[0][name] for name in ("step", *MEASURES)}
    for before, after in itertools.pairwise(curve):
        if after["target"] >= level:
            part = (level - before["target"]) / (after["target"] - before["target"])
            mix = lambda name, a=before, b=after, part=part: a[name] + part * (b[name] - a[name])
            return {name: mix(name) for name in ("step", *MEASURES)}
    return dict.fromkeys(("step", *MEASURES), float("nan"))


def judge(config: Config, runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    of = lambda method, name: np.array([at_level(run[method], config.judged)[name] for run in runs])
    gap = {name: of("otr", name) - of("sft", name) for name in MEASURES}
    sft = lambda name: f"SFT {of('sft', name).mean():.3f}"
    where = f"where the target is right at {config.judged}, OTR"
    return [
        Claim(
            f"{where} is nearer to the start than SFT on the target's questions (KL, nats)",
            "(spec)", [mean(gap["kl target"], "below", 0)], sft("kl target"),
        ),
        Claim(
            f"{where} is nearer to the start on the old tasks (KL, nats)",
            "forgets less", [mean(gap["kl old"], "below", 0)], sft("kl old"),
        ),
        Claim(
            f"{where} keeps more of the old tasks (accuracy)",
            "forgets less", [mean(gap["old"], "above", 0)], sft("old"),
        ),
    ]  # fmt: skip


def print_table(config: Config, runs: list[dict]) -> None:
    """At each level, means over seeds and differences from SFT."""
    table = Table(
        "target", "method", "step", "KL, target", "KL, old tasks", "old tasks", "old, less SFT's"
    )
    for level in config.levels:
        for method in runs[0]:
            found = [at_level(run[method], level) for run in runs]
            sft = [at_level(run["sft"], level) for run in runs]
            mean = lambda name, found=found: np.mean([row[name] for row in found])
            less = [a["old"] - b["old"] for a, b in zip(found, sft, strict=True)]
            table.add_row(
                str(level), method, f"{mean('step'):.0f}",
                *(f"{mean(name):.3f}" for name in MEASURES), show(less),
            )  # fmt: skip
    Console(width=140).print(table)


def _logits(model, params, batch):
    """[B, 6, V]: of the answer's tokens."""
    output = model.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"])
    return output.logits[:, SIZE - 1 : -1]


def _log_probs(model, params, batch):
    """log p [B] of whole answers."""
    answers = jnp.asarray(batch["tokens"][:, SIZE:])
    return -jnp.sum(losses.cross_entropy(_logits(model, params, batch), answers), axis=1)


def _figure(config, runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for method in runs[0]:
        curves = [run[method] for run in runs]
        for axes, name in zip(panels, MEASURES, strict=True):
            of = lambda name, curves=curves: [[row[name] for row in curve] for curve in curves]
            x = np.mean(of("target"), axis=0)
            plot_band(axes, x, of(name), "o-", markersize=2, label=method)
            axes.set(xlabel="accuracy of the target")
    panels[0].set(title="KL to the start, target's questions")
    panels[1].set(title="KL to the start, old tasks")
    panels[2].set(title="accuracy of the old tasks")
    panels[0].legend(fontsize=7)
    figure.savefig(output / "otr.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
