"""A Survey of Frontiers in LLM Reasoning: Inference Scaling, Learning to Reason, Agents (arXiv 2504.09037).

The survey sorts methods that spend compute on an answer (voting, verifiers, searches over steps,
refining, debating) and methods that train for it. Here they are measured at equal compute: accuracy
against the FLOPs of policy and verifier, every token counted.

    python experiments/papers/reasoning_survey/main.py     again after a break: finished seeds are kept
    python experiments/papers/reasoning_survey/main.py --terms 8 --until 0.1
    python experiments/papers/reasoning_survey/main.py --preset smollm2 --seeds 1     SmolLM2-135M, chain_sum
    python experiments/papers/reasoning_survey/main.py --preset full    Qwen2.5-Math-1.5B on GSM8K, 8 GPUs

The task is the sum of six one-digit numbers modulo 10, written as running totals, each a step:
7+5+9+8+3+6=2;1;9;2;8. A model of 0.1 M parameters, d 64 and two layers, is trained until every total of a
sampled chain is right with probability --until. A guessed answer is right in 0.1. An outcome and a process
reward model are trained from the model on its own chains, the process model with one rollout of each step as
label (Math-Shepherd's labels).

How compute is counted (`jaxft.generation.flops`): 2 N a token, and attention over its context; a token
of a prefix counts once, as in a prefix cache; the verifier is a model of the policy's size and counts
the same. Compute of training is left out. The script recomputes prefixes, which the count does not show.

Departures from the survey's methods: the model knows no language of critique, so that its feedback in
self-refinement is a second attempt in view of the first, and a debate shows an agent the others' chains
before the question. It was trained on no such prompt: a first version had rows of four questions in
pretraining, which took ten times as long. The reward models train all params, not a head on a frozen
trunk (on SmolLM2 they are such heads). Tools, budget forcing (`jaxft.generation.budget_force`) and few-shot
prompts are left out.

Settings were chosen on seed 100, where the verifiers stayed weak whatever was tried:

| tried | squared error (that of the mean) | best of n | by random values | process model's best |
| --- | --- | --- | --- | --- |
| whole totals, 120 steps, n = 16 | 0.228 (0.248) | 0.44 | 0.54 | |
| last digits, 600 questions with 4 chains each, n = 32 | | 0.095 | 0.160 | 0.185 |
| 3000 questions with 2 chains each, better start, n = 16 (default) | 0.198 (0.220) | 0.220 | 0.193 | 0.300 |
| the same, exact labels of steps instead of rollouts | 0.217 (0.220) | | 0.193 | 0.253 |
| the same as the default, three layers | 0.229 (0.246) | 0.247 | 0.273 | 0.367 |

With whole totals a wrong total need not spoil the answer, since the tens can be estimated from the question;
that is why totals are modulo 10. Probable causes of the weakness: it is as hard to verify a total as to
compute it, and the verifiers begin to learn it anew.

In the recorded run (docs/results.md), seeds 0 to 2, five of ten claims hold. Samples are right in 0.439,
votes of 8 in 0.742 and of 16 in 0.764, but greedy chains in 0.833: what sampling adds are errors, which the
vote does not remove entirely. The outcome model's squared error is 0.213, and 0.248 for the mean. Its best of
8 (0.344) is not shown to be better than by random values (0.307), and both fall as n grows: equal chains have
one value, so that the choice is among distinct chains, most of which are wrong. Weights of votes change
nothing. With the process model's smallest value the best of 4 is right in 0.549; MCTS, which follows the
policy's probabilities too, is right in 0.780 at the FLOPs of a vote of 8. RFT raises pass@1 from 0.439 to
0.755 and GRPO to 0.632, and pass@16 hardly changes (0.967 to 0.996 and 0.989).

`--preset smollm2` (smollm2.py) has votes and best of n only, on one seed: its claims are judged by their
estimates, and describe one run. Asked with examples of running totals, the model was right in 0.04 of
samples, so that it gets reasoning-gym's own question. On 23 held-out sums the greedy reply is right in 0.217,
a sample in 0.087, a vote of 8 in 0.130 and an oracle's choice in 0.348: too little for a vote to help.

`--preset full` takes Qwen2.5-Math-1.5B-Instruct and GSM8K; its verifiers are trained from the policy
too, where the literature has Qwen/Qwen2.5-Math-PRM-7B and peiyi9979/math-shepherd-mistral-7b-prm. The
survey has no such experiment; the bounds of the claims are ours.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, by_estimate, interval
from experiments.lab.claims import mean as by_interval
from experiments.lab.figures import plot_band
from experiments.lab.seeds import begin, measure_claims
from experiments.papers.reasoning_survey import learning, methods, smollm2
from experiments.papers.reasoning_survey.worlds import World, opened
from experiments.worlds import questions
from experiments.worlds import smollm2 as small_hub
from jaxft import train

GSM8K = questions.Settings(
    model="Qwen/Qwen2.5-Math-1.5B-Instruct",
    data="openai/gsm8k?name=main",
    eval_data="openai/gsm8k?name=main&split=test",
    max_new_tokens=1024,
    sampled_at_once=256,
    trained_at_once=16,
)
OF_SUMS = "terms pretraining until most_steps width layers rows_at_once".split()
FULL = dict(
    questions=2000, held_out=500, sizes=(4, 16, 64), most=256, learning_rate=1e-5, rl_rate=1e-6,
    verifier_steps=500, rft_steps=200, rl_steps=200,
)  # fmt: skip
SMOKE: dict[str, Any] = dict(
    seeds=1, terms=3, pretraining=64, questions=8, held_out=4, until=0.0, most_steps=30, sizes=(2,), most=2,
    own=2, rollouts=2, batch_size=16, verifier_steps=2, rft_steps=2, rl_steps=2, width=16, layers=1,
    rows_at_once=16,
)  # fmt: skip
CHAINS = ("majority", "best of N", "weighted vote", "oracle")
PARTS = {"main": {}, "smollm2": {"preset": "smollm2"}}  # parts of the record


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs, each with its own model and questions
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    terms: int = 6  # numbers of a sum
    pretraining: int = 12000  # questions to pretrain on
    until: float = 0.3  # probability of a right chain at which pretraining ends
    most_steps: int = 3000  # steps of pretraining, at most
    questions: int = 3000  # questions to train the verifiers and the policy on
    held_out: int = 150  # questions that measure accuracy
    sizes: tuple[int, ...] = (8,)  # budgets of searches, in chains
    most: int = 16  # chains of votes, at most
    own: int = 2  # chains for each question that verifiers and RFT learn from
    # rollouts that label a step; 0: no process model, and only choices among whole chains
    rollouts: int = 1
    verifier_steps: int = 400  # steps of each verifier
    rft_steps: int = 60  # steps of rejection sampling's fine-tuning
    rl_steps: int = 40  # steps of GRPO, 32 groups of 8
    batch_size: int = 64  # chains in a step
    learning_rate: float = 1e-3  # of verifiers and RFT
    rl_rate: float = 3e-4  # of GRPO
    depth: int = 16  # with --preset full: steps of an answer, at most
    width: int = 64  # width of the model
    layers: int = 2  # layers of the model
    rows_at_once: int = 256  # chains that are sampled at a time
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/reasoning_survey"
    # smollm2: SmolLM2-135M on reasoning-gym's chain_sum; full: a model and questions of the hub
    preset: Literal["small", "smollm2", "full"] = "small"
    source: questions.Settings = GSM8K
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    check(config)
    this = begin(config, PARTS)
    config = sized(config)
    check(config)
    with (smollm2.opened if config.preset == "smollm2" else opened)(config) as world:
        run = functools.partial(run_seed, config, world)
        return measure_claims(
            this, config, run, judge=functools.partial(judge, config), print_table=print_table,
            figure=functools.partial(_figure, config),
        )  # fmt: skip


def sized(config: Config) -> Config:
    """Returns the config with the sizes of its preset; raises ValueError for a flag without effect."""
    if config.preset == "smollm2":
        smoke = SMOKE | questions.SMALL | dict(sizes=(4,), most=4)
        learned = ("rft_steps", "rl_steps", "batch_size", "rl_rate")
        of_sums = [name for name in OF_SUMS if name != "rows_at_once"]
        return small_hub.sized(config, smollm2.SIZES, smoke, [*of_sums, *learned])
    return questions.sized(config, FULL, SMOKE, only_full=("depth",), only_small=OF_SUMS)


def check(config: Config) -> None:
    """Raises ValueError early for settings that would fail only after minutes."""
    if config.most & (config.most - 1) or not config.sizes or max(config.sizes) > config.most:
        raise ValueError(
            f"most and sizes: most must be a power of two, and no size above it; got {config.most} and "
            f"{config.sizes}."
        )
    if min(config.sizes) < 2:
        raise ValueError(f"sizes: must be at least 2, got {config.sizes}.")
    if config.preset != "full" and (config.terms < 3 or config.terms > 10):
        raise ValueError(f"terms: must lie in 3..10, got {config.terms}.")


def run_seed(config: Config, world: Callable[[int], World], seed: int) -> dict[str, Any]:
    """Measurements of one seed: curves of the start, and accuracies after learning."""
    world = world(seed)
    answers, right = learning.sampled(config, world, seed)
    print(f"seed {seed}: {np.mean(right):.3f} of its own chains are right", flush=True)
    outcome, process = learning.verifiers(config, world, answers, right, seed)
    curves = methods.curves(config, world, outcome, process, seed)
    shown = ", ".join(f"{name} {rows[-1]['accuracy']:.3f}" for name, rows in curves.items())
    print(f"seed {seed}: {shown}", flush=True)
    trained = {}
    if config.preset != "smollm2":  # It would take an hour.
        trained = {
            "RFT": learning.rft(config, world, answers, right, seed),
            "GRPO": learning.grpo(config, world, seed),
        }
    learned = {"start": methods.summary(curves)} | {
        name: methods.learned(config, world, params, outcome, seed)
        for name, params in trained.items()
    }
    shown = ", ".join(f"{name} greedy {row['greedy']:.3f}" for name, row in learned.items())
    print(f"    {shown}", flush=True)
    quality = methods.quality(world, outcome, seed)
    return {"curves": curves, "learned": learned, "verifier": quality}


def accuracy(runs: list[dict], name: str, n: int) -> np.ndarray:
    """Accuracy of a method at size n, per seed."""
    return np.array([at_size(run, name, n)["accuracy"] for run in runs])


def at_size(run: dict, name: str, n: int) -> dict[str, float]:
    """The row of a method at size n."""
    return next(row for row in run["curves"][name] if row["n"] == n)


def ahead(runs: list[dict], name: str, n: int, other: str) -> np.ndarray:
    """Accuracy of a method at size n less that of another at equal FLOPs, per seed.

    The other is interpolated linearly in the logarithm of FLOPs, and constant beyond its largest size.
    """
    gaps = []
    for run in runs:
        row, curve = at_size(run, name, n), run["curves"][other]
        costs, values = (np.array([point[key] for point in curve]) for key in ("flops", "accuracy"))
        gaps.append(row["accuracy"] - np.interp(np.log(row["flops"]), np.log(costs), values))
    return np.array(gaps)


def judge(config: Config, runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    n, of = max(config.sizes), functools.partial(accuracy, runs)
    mean = by_estimate if config.preset == "smollm2" else by_interval
    shown = lambda *names: ", ".join(f"{name} {of(name, n).mean():.3f}" for name in names)
    return [
        Claim(
            f"a majority vote of {n} chains is right more often than the greedy chain",
            "self-consistency rises with compute",
            [mean(of("majority", n) - of("greedy", 1), "above", 0)],
            f"greedy {of('greedy', 1).mean():.3f}, {shown('majority')}",
        ),
        Claim(
            f"weights by the outcome verifier do not harm the vote of {n}",
            "weighted vote >= majority",
            [mean(of("weighted vote", n) - of("majority", n), "at least", 0, by="any")],
            shown("weighted vote", "best of N"),
        ),
        Claim(
            f"best of {n} by the trained verifier is right more often than by a random one",
            "(spec: else falsified)",
            [mean(of("best of N", n) - of("best of N, random verifier", n), "above", 0)],
            shown("best of N, random verifier"),
        ),
        Claim(
            f"the vote of {n} stays far below an oracle's choice: the verifier is the limit",
            "saturates at the verifier's quality",
            [mean(of("oracle", n) - of("weighted vote", n), "above", 0.05)],
            shown("oracle"),
        ),
        Claim(
            f"at equal FLOPs, the weighted vote of {n} beats the majority vote",
            "verifier-guided beats voting if the verifier is good",
            [mean(ahead(runs, "weighted vote", n, "majority"), "above", 0)],
            f"squared error of the verifier {np.mean([r['verifier']['brier'] for r in runs]):.3f}, of the "
            f"mean {np.mean([r['verifier']['brier of the mean'] for r in runs]):.3f}",
        ),
        *(_search_claims(runs, n) if "MCTS" in runs[0]["curves"] else []),
        *(_learning_claims(runs, config.most) if "RFT" in runs[0]["learned"] else []),
    ]  # fmt: skip


def _search_claims(runs: list[dict], n: int) -> list[Claim]:
    """Claims about methods that sample on their own."""
    mean, of = by_interval, functools.partial(accuracy, runs)
    shown = lambda *names: ", ".join(f"{name} {of(name, n).mean():.3f}" for name in names)
    return [
        Claim(
            f"at equal FLOPs, step beam search of {n} beats best of N",
            "step search beats whole chains if errors are early",
            [mean(ahead(runs, "step beam search", n, "best of N"), "above", 0)],
            shown("step beam search", "DVTS", "MCTS"),
        ),
        Claim(
            "at equal FLOPs, self-refinement and debate gain nothing over the majority vote",
            "no gain for a small model (spec)",
            [
                mean(ahead(runs, name, n, "majority"), "at most", 0, by="any", label=name)
                for name in ("self-refine", "debate")
            ],
        ),
        Claim(
            f"adaptive consistency of at most {n} keeps the vote's accuracy at less than its FLOPs",
            "fewer samples, accuracy within 0.1 %",
            [
                mean(
                    of("adaptive consistency", n) - of("majority", n), "at least", -0.01, by="any",
                    label="accuracy",
                ),
                mean(saved(runs, n), "below", 1, label="FLOPs"),
            ],
        ),
    ]  # fmt: skip


def saved(runs: list[dict], n: int) -> list[float]:
    """FLOPs of adaptive consistency over those of the vote of n chains, per seed."""
    cost = lambda run, name: at_size(run, name, n)["flops"]
    return [cost(run, "adaptive consistency") / cost(run, "majority") for run in runs]


def _learning_claims(runs: list[dict], most: int) -> list[Claim]:
    at = lambda name, which: np.array([run["learned"][name]["pass"][which] for run in runs])
    claims = []
    for name in ("RFT", "GRPO"):
        gain, wide = (at(name, i) - at("start", i) for i in (0, -1))
        claims.append(
            Claim(
                f"{name} raises pass@1, by more than it changes pass@{most}",
                "learning moves pass@1 towards the earlier pass@n",
                [
                    by_interval(gain, "above", 0, label="pass@1"),
                    by_interval(gain - np.abs(wide), "above", 0, label="less the other change"),
                ],
                f"pass@1 {at('start', 0).mean():.3f} -> {at(name, 0).mean():.3f}, pass@{most} "
                f"{at('start', -1).mean():.3f} -> {at(name, -1).mean():.3f}",
            )
        )
    return claims


def print_table(runs: list[dict]) -> None:
    """Each method at each size: accuracy with its interval, FLOPs, tokens and sequential passes."""
    table = Table("method", "n", "accuracy", "MFLOPs", "tokens generated", "passes")
    for name, rows in runs[0]["curves"].items():
        for row in rows:
            at = [at_size(run, name, row["n"]) for run in runs]
            of = lambda key, at=at: float(np.mean([x.get(key, np.nan) for x in at]))
            middle, low, high = interval([x["accuracy"] for x in at])
            table.add_row(
                name, str(row["n"]), f"{middle:.3f} ({low:.3f} to {high:.3f})",
                f"{of('flops') / 1e6:.1f}", f"{of('generated'):.0f}", f"{of('passes'):.0f}",
            )  # fmt: skip
    Console(width=140).print(table)
    table = Table("params", "greedy", "pass@1", "pass@most", "vote of most", "best of most")
    for name in runs[0]["learned"]:
        rows = [run["learned"][name] for run in runs]
        cells = [np.mean([row["greedy"] for row in rows])]
        cells += [np.mean([row["pass"][i] for row in rows]) for i in (0, -1)]
        cells += [np.mean([row[key][-1] for row in rows]) for key in ("vote", "best")]
        table.add_row(name, *(f"{x:.3f}" for x in cells))
    Console(width=140).print(table)


def _figure(config, runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    first, second = figure.subplots(1, 2, width_ratios=(2, 1))
    for name in runs[0]["curves"]:
        curves = [run["curves"][name] for run in runs]
        of = lambda key, curves=curves: np.array([[row[key] for row in curve] for curve in curves])
        style = "-" if name in CHAINS else "o--"
        plot_band(first, of("flops").mean(axis=0), of("accuracy"), style, markersize=3, label=name)
    first.set(xscale="log", xlabel="FLOPs a question", ylabel="accuracy", title="the start")
    first.legend(fontsize=6, ncols=2)
    counts = methods.sizes(config)
    for name in runs[0]["learned"]:
        for key, style in (("pass", "--"), ("vote", "-")):
            values = [run["learned"][name][key] for run in runs]
            label = f"{name}, {'pass@n' if key == 'pass' else 'vote of n'}"
            plot_band(second, counts, values, style, label=label)
    second.set(xscale="log", xlabel="n chains", title="after learning")
    second.legend(fontsize=6)
    figure.savefig(output / "reasoning_survey.png", dpi=100)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
