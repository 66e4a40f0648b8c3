"""Echo Chamber: RL Post-training Amplifies Behaviors Learned in Pretraining (arXiv 2504.07912).

A model pretrained on a mixture of answer formats is trained by reinforcement learning with a reward
for correct answers in any format. Within a few steps it uses only one format: the one in which it
was most accurate.

    python experiments/papers/echo_chamber.py       after an interruption, again: finished seeds are kept
    python experiments/papers/echo_chamber.py --preset full     TinyGSM and OpenMathInstruct, then GSM8K
    python experiments/papers/echo_chamber.py --preset full --pretraining --model DIRECTORY

The task is the addition of three-digit numbers, 123+456=, with three formats, marked by the first
character: A0579, the sum; B9750|0579, its digits reversed and then the sum; C050709|0579, the sums
of the digits and then the sum. A model of 0.2 M parameters is pretrained on A, B and C in the
fractions 0.6, 0.3 and 0.1 until it gives one of the three fully correct strings with probability
0.25. The reward is 1 for a right sum at the end of an answer that has its format's length; the
working may be wrong. All measurements use eight samples for each of 384 held-out questions.

Two statements of the paper are not shown. pass@k does not fall for large k: the start is far from
its ceiling here, and pass@8 rises. The effect of the model's size (the paper's small models settle
on code, its large ones on prose) is not measured. Expert Iteration has its online form:
cross-entropy of the right answers among the same samples.

In the recorded run (docs/results.md), seeds 0 to 7, none of the four claims holds with its bound, and the
mechanism is visible: the share of the format that was most accurate at first rises from 0.58 to 0.87 of
all answers in 40 steps, but to 0.95 on three seeds of eight only; on some, two formats start equally
accurate. The choice of format is 46 % [19, 72] of the rise of pass@1 in 20 steps, where the claim is more
than half. The KL penalty lowers the share by 1 point [-2.4, 0.3]; and Expert Iteration is slightly faster,
because Adam scales its smaller gradients to steps of the same size. Seeds 3 to 7 were added because three
seeds left all four open (of these three the first claim had held in an earlier run).

`--preset full` pretrains the architecture of --model from random params on --pretraining, documents
in three formats: programs (TinyGSM), text with blocks of code (OpenMathInstruct-1) and text
(OpenMathInstruct-2), in the fractions of --mixture. With an empty --pretraining it starts from the
weights of --model. Reinforcement learning takes 10 passes over GSM8K with 64 x 8 answers a step, a
learning rate of 1e-6 and a KL weight of 0.01. The reward runs an answer's code or reads its text.
Departures: the model is SmolLM2-135M's architecture, not OLMo's of 150 M parameters; general text
on mathematics is left out; answers are sampled at temperature 1, for measurements at 0.7 and top-p
0.95; and pass@8 replaces pass@64.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, Number, mean, show, worst
from experiments.lab.figures import plot_band
from experiments.lab.seeds import begin, measure_claims
from experiments.worlds import arithmetic, documents, questions, solutions
from experiments.worlds.workings import (
    FORMATS,
    question,
    result_reward,
    right_probability,
    rows_of,
    sampling,
)
from jaxft import rl, train
from jaxft.metrics import pass_at_k
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_mean
from jaxft.rl.token_losses import clipped

LIMIT = sampling().max_new_tokens
SAMPLES = 8  # for each held-out question
ARMS = ("GRPO", "GRPO with KL", "Expert Iteration")
GSM8K = questions.Settings(
    model="HuggingFaceTB/SmolLM2-135M",
    data="openai/gsm8k?name=main",
    eval_data="openai/gsm8k?name=main&split=test",
    trained_at_once=128,
)
OF_SUMS = ("until", "held_out", "width", "layers")
OF_FULL = ("pretraining", "pretrain_steps", "pretrain_rows")
FULL = dict(
    steps=1160,
    evaluate_every=58,
    early=116,
    prompts_per_step=64,
    learning_rate=1e-6,
    kl_weight=0.01,
)
SMOKE = dict(
    seeds=1, until=1e-6, steps=2, evaluate_every=1, early=1, prompts_per_step=2, group_size=4, held_out=16,
    width=32, layers=1, pretrain_steps=2, pretrain_rows=4,
    pretraining=tuple(f"rg:chain_sum?size=8&seed={i}" for i in range(3)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    mixture: tuple[float, float, float] = (0.6, 0.3, 0.1)  # fractions of A, B and C in pretraining
    until: float = 0.25  # probability of a fully correct string at which pretraining ends
    steps: int = 40  # optimizer steps of RL
    evaluate_every: int = 5  # steps between evaluations
    early: int = 20  # the step at which selection of a format is separated from learning
    prompts_per_step: int = 32  # questions per rollout
    group_size: int = 8  # answers to each question
    learning_rate: float = 2e-4  # learning rate of RL, constant
    kl_weight: float = 0.1  # weight of the KL to the pretrained model
    held_out: int = 384  # problems for the measurements
    width: int = 96  # width of the model
    layers: int = 2  # layers of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/echo_chamber"
    # full: documents of three formats, then GSM8K; one GPU of 80 GB
    preset: Literal["small", "full"] = "small"
    # with --preset full: documents in the formats of worlds/solutions.py, as for --data; none: no pretraining
    pretraining: tuple[str, ...] = tuple(solutions.SOURCES)
    pretrain_steps: int = 5000  # with --preset full: steps of pretraining
    pretrain_rows: int = 512  # with --preset full: rows per step of pretraining, 2048 tokens each
    source: questions.Settings = GSM8K
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    config = questions.sized(config, FULL, SMOKE, only_full=OF_FULL, only_small=OF_SUMS)
    if config.pretraining and len(config.pretraining) != len(solutions.FORMATS):
        raise ValueError(
            f"pretraining: one source for each of {solutions.FORMATS}, or none; got {config.pretraining}."
        )
    with opened(config) as world:
        return measure_claims(
            this,
            config,
            functools.partial(run_seed, config, world),
            judge=functools.partial(judge, config),
            print_table=print_table,
            figure=_figure,
        )


class World(NamedTuple):
    """A pretrained model that answers in three formats, and its questions."""

    model: Decoder
    start: Any  # params
    measure: Callable[[Any], dict]  # params -> `shares_and_accuracy`
    collect: Callable[..., rl.Collector]  # (credit, reference params or None)
    fit: Callable[..., tuple]  # `fit` of (objective, batches, ...), from the start


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: sums by a small model or, with --preset full, the source's questions."""
    if config.preset != "full":
        yield functools.partial(sums, config)
        return
    with questions.opened(config.source, documents.worked, solutions.grader) as task:
        yield functools.partial(problems, config, task)


def problems(config: Config, task: questions.Task, seed: int) -> World:
    """Returns the world of the task's questions, with a model pretrained for the seed."""
    if config.pretraining:
        sources = [(spec, solutions.SOURCES.get(spec, {})) for spec in config.pretraining]
        task = documents.pretrained(
            task, sources, config.mixture, documents.worked, rows=config.pretrain_rows,
            steps=config.pretrain_steps, seed=seed,
        )  # fmt: skip

    def measure(params):
        texts, right = questions.graded(
            task, params, task.held_out, SAMPLES, seed, temperature=0.7, top_p=0.95
        )
        used = [[solutions.format_of(text) for text in some] for some in texts]
        return shares_and_accuracy(right, np.eye(len(solutions.FORMATS))[np.array(used)])

    collect = lambda credit, ref_params: questions.experience(
        task,
        credit,
        config.prompts_per_step,
        seed,
        group_size=config.group_size,
        ref_params=ref_params,
    )
    fit = lambda objective, batches, **more: questions.fit(
        task, task.params, objective, config.learning_rate, batches,
        config.prompts_per_step * config.group_size, **more,
    )  # fmt: skip
    return World(task.model, task.params, measure, collect, fit)


def sums(config: Config, seed: int) -> World:
    """Returns the world of sums, with a model pretrained for the seed."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(1_000_000)
    pairs = np.stack([pairs // 1000, pairs % 1000], axis=1)
    held_out, known = pairs[: config.held_out], pairs[config.held_out :][:20_000]
    model, params = arithmetic.small_model(jax.random.key(seed), config.width, layers=config.layers)
    params, steps = pretrain(config, model, params, known, rng, seed)
    print(f"seed {seed}: {steps} steps of pretraining", flush=True)
    asked = arithmetic.encode([question(a, b) for a, b in known])
    collect = lambda credit, ref_params: rl.collect_on_device(
        model,
        rl.Prompts(asked, config.prompts_per_step, seed=seed),
        result_reward(known.sum(axis=1)),
        credit,
        sampling(),
        group_size=config.group_size,
        ref_params=ref_params,
    )
    optimizer = arithmetic.policy_optimizer(config.learning_rate)
    fit = lambda objective, batches, **more: train.fit(
        params, objective, optimizer, batches, **more
    )
    return World(model, params, measures(model, held_out, seed), collect, fit)


def run_seed(config: Config, world: Callable[[int], World], seed: int) -> dict[str, list[dict]]:
    """{arm: [measures at a step]} from one pretrained model."""
    world = world(seed)
    start = world.measure(world.start) | {"step": 0}
    print(f"seed {seed}: pass@1 {start['pass@1']:.3f} after pretraining", flush=True)
    runs = {}
    for arm in ARMS:
        history = train_arm(config, world, seed, arm)
        runs[arm] = [start] + [
            {name: row[name] for name in start} for row in history if "pass@1" in row
        ]
        print(f"    {arm}: pass@1 {runs[arm][-1]['pass@1']:.3f}", flush=True)
    return runs


def pretrain(config, model, params, pairs, rng, seed) -> tuple[Any, int]:
    """(params, steps): supervised on the mixture, until right strings have the probability `until`."""
    names = rng.choice(list(FORMATS), len(pairs), p=config.mixture)
    rows, right = rows_of(pairs, names), right_probability(model, pairs[:200])
    return arithmetic.warm_start(model, params, rows, seed, until=config.until, measure=right)


def train_arm(config: Config, world: World, seed: int, arm: str) -> list[dict]:
    """The history of one arm, with measures in it."""
    build = functools.partial(policy_gradient, world.model.forward)
    grpo = rl.grpo(build, config.group_size).credit
    held_back = functools.partial(build, kl_weight=config.kl_weight)
    algorithm = {
        "GRPO": lambda: rl.Algorithm(grpo, build(clipped(), token_mean)),
        "GRPO with KL": lambda: rl.Algorithm(grpo, held_back(clipped(), token_mean)),
        "Expert Iteration": lambda: rl.expert_iteration(build),
    }[arm]()
    _, history = world.fit(
        algorithm.objective,
        world.collect(algorithm.credit, world.start if arm == "GRPO with KL" else None),
        steps=config.steps,
        key=jax.random.key(seed),
        callbacks=[train.every(config.evaluate_every, lambda state: world.measure(state.params))],
    )
    return history


def measures(model: Decoder, pairs: np.ndarray, seed: int) -> Callable[[Any], dict]:
    """Returns measure(params): `shares_and_accuracy` of samples for sums."""
    prompts = arithmetic.encode([question(a, b) for a, b in pairs])
    reward, numbers = result_reward(pairs.sum(axis=1)), np.repeat(np.arange(len(pairs)), SAMPLES)
    firsts = np.array([arithmetic.ALPHABET.index(name) for name in FORMATS])

    def measure(params):
        tokens, mask = rl.sample_on_device(
            model, params, prompts, jax.random.key(seed), sampling(), SAMPLES
        )
        flat = lambda x: jnp.asarray(x.reshape(-1, LIMIT))
        right = np.asarray(reward(flat(tokens), flat(mask), numbers)).reshape(-1, SAMPLES)
        return shares_and_accuracy(right, tokens[:, :, :1] == firsts)

    return measure


def shares_and_accuracy(right: np.ndarray, used: np.ndarray) -> dict[str, Any]:
    """Fractions of formats, accuracy in each (0 if unused), pass@1, pass@8.

    Args:
        right: [Q, SAMPLES], 1 for right answers.
        used: [Q, SAMPLES, formats], 1 for the format of an answer.
    """
    within = (right[..., None] * used).sum((0, 1)) / np.maximum(used.sum((0, 1)), 1)
    return {
        "shares": used.mean((0, 1)).tolist(),
        "accuracy": within.tolist(),
        "pass@1": float(right.mean()),
        "pass@8": float(pass_at_k(right.sum(axis=1), SAMPLES, 8).mean()),
    }


def selected(before: dict, after: dict) -> float:
    """Σ_f (share_f - share_f(0)) accuracy_f(0): the rise of pass@1 if only the choice of format moved."""
    moved = np.subtract(after["shares"], before["shares"])
    return float(moved @ np.asarray(before["accuracy"]))


def judge(config: Config, runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    best = [int(np.argmax(run["GRPO"][0]["accuracy"])) for run in runs]
    at = lambda run, arm, step: next(row for row in run[arm] if row["step"] == step)
    share = lambda arm, step: np.array(
        [at(run, arm, step)["shares"][b] for run, b in zip(runs, best, strict=True)]
    )
    first, last = share("GRPO", 0), share("GRPO", config.steps)
    rises = [at(r, "GRPO", config.early)["pass@1"] - r["GRPO"][0]["pass@1"] for r in runs]
    parts = [
        selected(r["GRPO"][0], at(r, "GRPO", config.early)) / max(rise, 1e-6)
        for r, rise in zip(runs, rises, strict=True)
    ]
    slower = {arm: share(arm, config.early) - share("GRPO", config.early) for arm in ARMS[1:]}
    only = float(np.mean(last >= 0.95))
    return [
        Claim(
            f"by step {config.steps} the format that was most accurate is almost the only one",
            "one format, often that one",
            [
                Number(only, "at least", 2 / 3, label="seeds with 0.95 of all answers:", style=".0%"),
                worst(last - first, "above", 0.1, label="smallest rise"),
            ],
            f"share {first.mean():.3f} -> {show(last)}",
        ),
        Claim(
            f"most of pass@1's rise by step {config.early} is the choice of format",
            "RL amplifies what is there",
            [mean(parts, "above", 0.5)],
            f"of {np.mean(rises):.3f}",
        ),
        Claim(
            "a KL penalty slows the collapse",
            "less KL, more complete",
            [mean(slower["GRPO with KL"], "below", 0, label=f"share at step {config.early}:")],
        ),
        Claim(
            "Expert Iteration goes to the same format, more slowly",
            "slower and less",
            [
                mean(slower["Expert Iteration"], "below", 0, label=f"share at step {config.early}:"),
                worst(share("Expert Iteration", config.steps) - first, "above", 0,
                      label="smallest rise in the end"),
            ],
        ),
    ]  # fmt: skip


def print_table(runs: list[dict]) -> None:
    """Shares, accuracy within formats, pass@1 and pass@8 by step: means over seeds."""
    table = Table("arm", "step", "share A / B / C", "accuracy within", "pass@1", "pass@8")
    three = lambda values: " / ".join(f"{value:.3f}" for value in values)
    for arm in ARMS:
        for rows in zip(*(run[arm] for run in runs), strict=True):
            mean = lambda name, rows=rows: np.mean([row[name] for row in rows], axis=0)
            table.add_row(
                arm, str(rows[0]["step"]), three(mean("shares")), three(mean("accuracy")),
                f"{mean('pass@1'):.3f}", f"{mean('pass@8'):.3f}",
            )  # fmt: skip
    Console(width=140).print(table)


def _figure(runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, arm in zip(figure.subplots(1, len(ARMS), sharey=True), ARMS, strict=True):
        steps = [row["step"] for row in runs[0][arm]]
        shares = np.mean([[row["shares"] for row in run[arm]] for run in runs], axis=0)
        axes.stackplot(steps, shares.T, labels=list(FORMATS), alpha=0.7)
        right = [[row["pass@1"] for row in run[arm]] for run in runs]
        plot_band(axes, steps, right, "k", label="pass@1")
        axes.set(title=arm, xlabel="step", ylim=(0, 1), xlim=(0, max(steps)))
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(output / "echo_chamber.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
