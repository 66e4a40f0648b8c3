"""ReFT: Reasoning with Reinforced Fine-Tuning (arXiv 2401.08967).

After a short warm-up on annotated workings, PPO trains on the same questions with the answer as
reward: the model learns from many workings that it finds itself, where supervised fine-tuning (SFT)
has the annotated one.

    python experiments/papers/reft/main.py       after an interruption, again: finished seeds are kept
    python experiments/papers/reft/main.py --algo sft reft --kl 0 --partial-reward 0
    python experiments/papers/reft/main.py --preset full     CodeLlama-7B on GSM8K, 8 GPUs of 80 GB
    python experiments/papers/reft/main.py --preset full --model Qwen/Qwen2.5-0.5B --data workings.jsonl

The task is the addition of two-digit numbers, 47+85=, with one of two kinds of written-out working
before the sum: B231|132, its digits reversed; C1212|132, the sums of the columns. A model of 0.1 M
parameters is pretrained on sums of other numbers until a working is right with probability 0.3. The
warm-up is two epochs on 750 questions with one annotated working each. After it, all algorithms
take as many steps on as many workings: SFT on the annotated ones (41 epochs; the paper's SFT has
40); offline self-training on these and on the model's own right ones, each once; online
self-training on half of either; and ReFT, which is PPO with a critic on the same model, a reward of
0.1 for a wrong sum that can be read, and a KL weight of 0.05 in the reward.

In the recorded run (docs/results.md), seeds 0 to 4, ReFT's greedy answers to held-out questions are right
in 0.703 and SFT's in 0.527 (+0.176 [0.107, 0.246]; SFT's are right in 0.576 at its best measured step).
Voting adds nothing to ReFT (+0.005 [-0.008, 0.017]), which has one kind of working left, and 11 points
to SFT, which has both. Online self-training is not between the two: it is right in 0.733, and offline
self-training in 0.741. Seeds 3 and 4 were added because an earlier run of three seeds could not
distinguish ReFT from SFT (+0.218 [-0.010, 0.445]).

Settings were chosen on seeds 100 and 101. The amount of data determines the result: with 750
questions ReFT was 6 and 8 points above SFT; with 1500 (and KL 0.01) it was 4 and 3 points below,
because SFT then has enough annotated workings; with 1000 questions and no pretraining, neither
learns more than the training questions.

Departures from the paper: offline self-training starts from the warm-up, as all algorithms do,
where the authors start again from the base model; `--rerank` has one classifier, of the warm-up
model's answers, for all algorithms.

`--preset full` has the paper's model, its text form of questions and GSM8K's own workings in
natural language (the authors' annotations are read by --data and --fields), learning rates of 1e-5
(supervised) and 3e-7 (on samples), 2 epochs of warm-up, a weight of 5 of the critic's loss, 100
samples for offline self-training and for votes. All algorithms take as many steps as 40 epochs of
SFT in batches of 48, where the authors give PPO 300 epochs in batches of 32; --steps changes that.
Kinds of working and --rerank are measured in the small world only, and programs as workings are
left out.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, mean, show
from experiments.lab.figures import plot_mean
from experiments.lab.seeds import begin, measure_claims
from experiments.papers.reft.worlds import World, opened
from experiments.worlds import arithmetic, questions, reranker, workings
from jaxft import rl, train
from jaxft.metrics import majority_vote, rerank
from jaxft.objectives import policy_gradient, supervised, with_value_head, without_value_head
from jaxft.rewards import answer_reward, numbers_equal

ALGORITHMS = ("sft", "offline_st", "online_st", "reft")
ROLLOUT = 4  # optimizer steps of PPO on one rollout: two epochs of two parts
MEASURES = ("greedy", "sampled", "vote")
SMOKE: dict[str, Any] = dict(
    algo=("sft", "reft"), seeds=1, kinds="C", pretraining=64, questions=32, held_out=4, until=0.0,
    warmup_epochs=0, steps=4, batch_size=32, evaluate_every=4, samples=2, votes=2, width=32,
    layers=1,
)  # fmt: skip

GSM8K = questions.Settings(
    model="codellama/CodeLlama-7b-hf",
    data="openai/gsm8k?name=main",
    eval_data="openai/gsm8k?name=main&split=test",
    max_new_tokens=700,
    sampled_at_once=256,
    trained_at_once=24,
)
OF_SUMS = "digits kinds pretraining until questions held_out rerank width layers".split()
FULL = dict(
    steps=6240, batch_size=48, evaluate_every=624, votes=100, own=100, learning_rate=1e-5, rl_rate=3e-7,
    value_weight=5.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    algo: tuple[str, ...] = ALGORITHMS  # the methods to compare
    seeds: int = 5  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    digits: int = 2  # digits of the numbers that are added
    kinds: str = "BC"  # kinds of working in all data, equally often
    pretraining: int = 6000  # sums of other numbers, with either kind of working
    until: float = 0.3  # probability of a correct working at which pretraining ends
    questions: int = 750  # questions to fine-tune on, with one annotated working each
    held_out: int = 1000  # questions that measure accuracy
    warmup_epochs: int = 2  # epochs on the annotated workings before all algorithms
    steps: int = 240  # steps of each algorithm after the warm-up
    batch_size: int = 128  # workings trained on in a step
    evaluate_every: int = 60  # steps between evaluations
    samples: int = 2  # samples per held-out question during training
    votes: int = 32  # samples per held-out question at the end
    learning_rate: float = 3e-4  # learning rate of the warm-up and all algorithms
    rl_rate: float | None = None  # learning rate of reft and online_st; None: --learning-rate
    kl: float = 0.05  # weight of the KL to the warm-up model in PPO's rewards
    partial_reward: float = 0.1  # reward of a readable but wrong answer
    value_weight: float = 0.5  # weight of the critic's loss in PPO
    own: int = 8  # samples per training question, for offline self-training
    rerank: bool = False  # also select among the samples by a classifier of workings
    width: int = 64  # width of the model
    layers: int = 2  # layers of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/reft"
    preset: Literal["small", "full"] = "small"  # full: the paper's model, data and sizes
    source: questions.Settings = GSM8K
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    check(config)
    this = begin(config)
    config = questions.sized(config, FULL, SMOKE, only_small=OF_SUMS)
    with opened(config) as world:
        run = functools.partial(run_seed, config, world)
        return measure_claims(
            this, config, run, judge=judge, print_table=print_table, figure=_figure
        )


def check(config: Config) -> None:
    """Raises ValueError early for settings that would fail only after minutes."""
    if set(config.algo) - set(ALGORITHMS) or not {"sft", "reft"} <= set(config.algo):
        raise ValueError(
            f"algo: sft, reft and others of {ALGORITHMS} are expected, got {config.algo}."
        )
    if not 0 <= config.partial_reward <= 1:
        raise ValueError(f"partial_reward: must lie in [0, 1], got {config.partial_reward}.")
    if not config.kinds or set(config.kinds) - set(workings.FORMATS):
        raise ValueError(f"kinds: some of {workings.FORMATS} are expected, got {config.kinds!r}.")
    if config.steps % ROLLOUT or config.batch_size % 2:
        raise ValueError(
            f"steps must be a multiple of {ROLLOUT} and batch_size even, got {config.steps} and "
            f"{config.batch_size}."
        )
    sizes = (config.pretraining, config.questions, config.held_out)
    if sum(sizes) > 100**config.digits:
        raise ValueError(
            f"pretraining, questions and held_out: there are {100**config.digits} sums of {config.digits} "
            f"digits, got {sizes}."
        )


def run_seed(config: Config, world: Callable[[int], World], seed: int) -> dict[str, list[dict]]:
    """{algorithm: [measures at a step]} from one warm-up."""
    world = world(seed)
    rows = world.lay_out(range(len(world.gold)), world.gold)
    start = warm_up(config, world, rows, seed)
    rank = ranker(config, world, start, seed) if config.rerank else None
    measure = measures(world, seed, rank)
    first = measure(start, config.votes) | {"step": 0}
    shown = lambda row: ", ".join(f"{name} {row[name]:.3f}" for name in MEASURES)
    print(f"seed {seed}: after the warm-up {shown(first)}", flush=True)
    runs = {}
    for name in config.algo:
        history = train_algorithm(config, world, start, rows, seed, name, measure)
        runs[name] = [first, *history]
        print(f"    {name}: {shown(history[-1])}", flush=True)
    return runs


def warm_up(config: Config, world: World, rows: dict, seed: int) -> Any:
    """Params after `warmup_epochs` on the annotated workings."""
    size = config.batch_size
    steps = config.warmup_epochs * (len(rows["tokens"]) // size)
    if not steps:
        return world.start
    batches = itertools.islice(arithmetic.batches_of(rows, seed, size), steps)
    objective = supervised(world.model.forward)
    return world.fit(world.start, objective, config.learning_rate, batches, size)[0].params


def train_algorithm(config, world, start, rows, seed, name, measure) -> list[dict]:
    """Trains one algorithm; returns the measurements along the run."""
    forward, size = world.model.forward, config.batch_size
    params, rate = start, config.rl_rate or config.learning_rate
    if name == "reft":
        build = functools.partial(policy_gradient, forward)
        credit, objective = rl.ppo(build, config.kl, value_weight=config.value_weight)
        batches = world.collect(
            2 * size, config.partial_reward, credit, seed, updates=2, epochs=2, ref_params=start
        )
        params = with_value_head(world.model, start)
    elif name == "online_st":
        half = rl.Prompts(world.known.ids, size // 2, seed=seed)
        own = world.collect(size // 2, 0.0, rl.right_samples, seed)
        objective = rl.online_self_training(forward)
        batches = with_gold(own, half, workings.supervised_rows(rows))
    else:
        objective, rate = supervised(forward), config.learning_rate
        if name == "offline_st":
            rows = own_rows(config, world, start, seed)
        batches = arithmetic.batches_of(rows, seed, size)
    state, history = world.fit(
        params,
        objective,
        rate,
        batches,
        size // 2 if name == "online_st" else size,
        steps=config.steps,
        key=jax.random.key(seed),
        callbacks=[
            train.every(
                config.evaluate_every,
                lambda state: measure(without_value_head(state.params), config.samples),
            )
        ],
    )
    names = ("step", *MEASURES, "rerank", "kinds", "reward", "right")
    found = [{k: row[k] for k in names if k in row} for row in history if "greedy" in row]
    found[-1] |= measure(without_value_head(state.params), config.votes)
    return found


def with_gold(own: rl.Collector, prompts: rl.Prompts, gold: dict[str, Any]) -> rl.Collector:
    """Batches of online self-training: samples, and the annotated workings of the same questions."""

    def collect(params, carry, key):
        chosen = prompts.chosen(int(carry["experience"]["draws"]))
        samples, carry = own(params, carry, key)
        return {"samples": samples, "gold": jax.tree.map(lambda x: x[chosen], gold)}, carry

    return rl.Collector(collect, own.carry)


def own_answers(config: Config, world: World, start: Any, seed: int) -> tuple[list, list]:
    """(the warm-up model's answers to each training question, whether each of these is right)."""
    texts = world.answers(start, world.known, config.own, seed)
    right = answer_reward(world.parse, numbers_equal, partial=0.0)
    pairs = zip(texts, world.known.records, strict=True)
    return texts, [[right(text, record) == 1 for text in some] for some, record in pairs]


def own_rows(config: Config, world: World, start: Any, seed: int) -> dict[str, np.ndarray]:
    """Rows of the annotated workings, and of the warm-up model's own right ones, each once."""
    kept = rl.offline_collect(*own_answers(config, world, start, seed), world.gold)
    return world.lay_out(*zip(*kept, strict=True))


def ranker(config: Config, world: World, start: Any, seed: int) -> Callable[[Any], list]:
    """rank(texts): scores by a classifier trained on the warm-up model's own answers."""
    asked = lambda part: [record["question"] for record in part.records]
    params = reranker.train_reranker(
        world.model, start, asked(world.known), *own_answers(config, world, start, seed),
        steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate,
        seed=seed,
    )  # fmt: skip
    return functools.partial(reranker.scores, world.model, params, asked(world.held_out))


def measures(world: World, seed: int, rank: Any = None) -> Callable[[Any, int], dict[str, Any]]:
    """Returns measure(params, samples): accuracy of greedy answers, samples, votes; fractions of kinds.

    With `rank`, also the accuracy of the answer that it scores highest.
    """
    right = answer_reward(lambda text: text, numbers_equal, partial=0.0)

    def accuracy(found):
        pairs = zip(found, world.held_out.records, strict=True)
        return float(np.mean([0.0 if f is None else right(f, record) for f, record in pairs]))

    def measure(params, samples):
        greedy = world.answers(params, world.held_out, 1, seed, temperature=0.0)
        texts = world.answers(params, world.held_out, samples, seed)
        found = [[world.parse(text) for text in some] for some in texts]
        firsts = [text[:1] for some in texts for text in some]
        chosen = {}
        if rank is not None:
            chosen = {"rerank": accuracy(list(map(rerank, rank(texts), found)))}
        return chosen | {
            "greedy": accuracy([world.parse(text) for (text,) in greedy]),
            "sampled": float(np.mean([accuracy(column) for column in zip(*found, strict=True)])),
            "vote": accuracy([majority_vote(some) for some in found]),
            "kinds": [firsts.count(kind) / len(firsts) for kind in world.kinds],
        }

    return measure


def judge(runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    last = lambda name, measure: np.array([run[name][-1][measure] for run in runs])
    best = np.array([max(row["greedy"] for row in run["sft"]) for run in runs])
    gain = last("reft", "greedy") - last("sft", "greedy")
    ahead = last("reft", "greedy") - best
    vote = last("reft", "vote") - last("reft", "greedy")
    return [
        Claim(
            "ReFT is above SFT continued for as many examples (greedy, held out)",
            "63.7 -> 75.3 on GSM8K",
            [mean(gain, "above", 0)],
            f"{last('sft', 'greedy').mean():.3f} -> {last('reft', 'greedy').mean():.3f}",
        ),
        Claim(
            "control: and above SFT at its best measured step",
            "(ours)",
            [mean(ahead, "above", 0)],
            f"SFT {best.mean():.3f}",
        ),
        Claim(
            "majority voting of ReFT's samples is above its greedy answers",
            "75.3 -> 78.0",
            [mean(vote, "above", 0)],
        ),
    ]


def print_table(runs: list[dict]) -> None:
    """Accuracies on held-out questions at the last step, means over seeds, and greedy ones against SFT's."""
    shown = [*MEASURES, *("rerank",) * ("rerank" in runs[0]["sft"][-1])]
    table = Table("algorithm", *shown, "kinds", "greedy, less SFT's", "best greedy of the run")
    rows = {"start": [run["sft"][0] for run in runs]}
    rows |= {name: [run[name][-1] for run in runs] for name in runs[0]}
    for name, found in rows.items():
        mean = lambda measure, found=found: np.mean([row[measure] for row in found], axis=0)
        less = [
            row["greedy"] - run["sft"][-1]["greedy"] for row, run in zip(found, runs, strict=True)
        ]
        best = [max(row["greedy"] for row in run.get(name, run["sft"][:1])) for run in runs]
        table.add_row(
            name, *(f"{mean(measure):.3f}" for measure in shown),
            " / ".join(f"{share:.2f}" for share in mean("kinds")), show(less), f"{np.mean(best):.3f}",
        )  # fmt: skip
    Console(width=140).print(table)


def _figure(runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 3, sharey=True), MEASURES, strict=True):
        for name in runs[0]:
            value = operator.itemgetter(measure)
            plot_mean(axes, runs, name, value, "o-", markersize=2, label=name)
        axes.set(xlabel="step after the warm-up", title=measure)
    axes.legend(fontsize=7)
    figure.savefig(output / "reft.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
