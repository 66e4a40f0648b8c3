"""ReFT: Reasoning with Reinforced Fine-Tuning (arXiv 2401.08967).

After a short warm-up on annotated workings, PPO on the same questions with the answer as reward: the model
learns from many workings that it finds itself, where supervised fine-tuning (SFT) has the annotated one.

    python experiments/papers/reft.py       after an interruption, again: finished seeds are kept
    python experiments/papers/reft.py --algo sft reft --kl 0 --partial-reward 0

The task is the addition of two-digit numbers, 47+85=, with one of two kinds of written-out working before the
sum: B231|132, its digits reversed; C1212|132, the sums of the columns. A model of 0.1 M parameters is
pretrained on sums of other numbers until a working is right with probability 0.3. Two epochs on 750 questions
with one annotated working each are the warm-up. From there all algorithms take as many steps on as many
workings: SFT on the annotated ones (41 epochs; the paper's SFT has 40); offline self-training on these and
the model's own right ones, each once; online self-training, half of either; and ReFT: PPO with a critic on
the same model, 0.1 for a wrong sum that can be read, KL 0.05 in the reward.

Over seeds 0 to 4 ReFT's greedy answers are right in 0.707 of held-out questions, SFT's in 0.527 (+0.181
[0.078, 0.284]; at its best measured step SFT's are in 0.576). Voting adds nothing to ReFT (+0.002 [-0.009,
0.014]), which has one kind of working left, and 11 points to SFT, which has both. Online self-training is
not between the two: it is right in 0.741, as is offline self-training, and ReFT cannot be distinguished from
it (-0.033 [-0.112, 0.046]). Seeds 3 and 4 were added when three could not tell ReFT from SFT (+0.218
[-0.010, 0.445]).

Settings were chosen on seeds 100 and 101, and the amount of data decides: with 750 questions ReFT was 6 and
8 points above SFT, with 1500 (and KL 0.01) 4 and 3 below, for SFT then has enough annotated workings; with
1000 and no pretraining neither learns anything but the training questions.

Departures: offline self-training goes on from the warm-up, as all do, where the authors begin anew from the
base model; `--rerank` has one classifier, of the warm-up model's answers, for all algorithms.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, mean, show
from experiments.lab.figures import plot_mean
from experiments.lab.seeds import begin, measure_claims
from experiments.worlds import arithmetic, reranker, workings
from jaxft import rl, train
from jaxft.metrics import majority_vote, rerank
from jaxft.models import Decoder
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
    learning_rate: float = 3e-4  # learning rate of all algorithms
    kl: float = 0.05  # weight of the KL to the warm-up model in PPO's rewards
    partial_reward: float = 0.1  # reward of a readable but wrong answer
    value_weight: float = 0.5  # weight of the critic's loss in PPO
    own: int = 8  # samples per training question, for offline self-training
    rerank: bool = False  # also select among the samples by a classifier of workings
    width: int = 64  # width of the model
    layers: int = 2  # layers of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/reft"
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    check(config)
    this = begin(config)
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    run = functools.partial(run_seed, config)
    return measure_claims(this, config, run, judge=judge, print_table=print_table, figure=_figure)


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


def run_seed(config: Config, seed: int) -> dict[str, list[dict]]:
    """{algorithm: [measures at a step]} from one warm-up."""
    sizes = (config.pretraining, config.questions, config.held_out)
    made = workings.started(
        seed, sizes, config.kinds, config.until, digits=config.digits, width=config.width,
        layers=config.layers,
    )  # fmt: skip
    model, pairs, rows = made.model, made.pairs, made.rows
    start = warm_up(config, model, made.params, rows, seed)
    rank = ranker(config, model, start, pairs, seed) if config.rerank else None
    measure = measures(config, model, made.held_out, seed, rank)
    first = measure(start, config.votes) | {"step": 0}
    text = ", ".join(f"{name} {first[name]:.3f}" for name in MEASURES)
    print(f"seed {seed}: {made.steps} steps of pretraining; after the warm-up {text}", flush=True)
    runs = {}
    for name in config.algo:
        history = train_algorithm(config, model, start, pairs, rows, seed, name, measure)
        runs[name] = [first, *history]
        text = ", ".join(f"{m} {history[-1][m]:.3f}" for m in MEASURES)
        print(f"    {name}: {text}", flush=True)
    return runs


def warm_up(config, model, params, rows, seed) -> Any:
    """Params after `warmup_epochs` on the annotated workings."""
    steps = config.warmup_epochs * (len(rows["tokens"]) // config.batch_size)
    if not steps:
        return params
    batches = itertools.islice(arithmetic.batches_of(rows, seed, config.batch_size), steps)
    optimizer = arithmetic.policy_optimizer(config.learning_rate)
    return train.fit(params, supervised(model.forward), optimizer, batches)[0].params


def train_algorithm(config, model, start, pairs, rows, seed, name, measure) -> list[dict]:
    """Trains one algorithm; returns the measurements along the run."""
    asked = arithmetic.encode([workings.question(*pair, config.digits) for pair in pairs])
    totals = pairs.sum(axis=1)
    sampling = workings.sampling(config.digits)
    prompts = functools.partial(rl.Prompts, asked, seed=seed)
    collect = functools.partial(rl.collect_on_device, model, config=sampling, group_size=1)
    reward = functools.partial(workings.result_reward, totals, config.digits)
    params = start
    if name == "reft":
        build = functools.partial(policy_gradient, model.forward)
        credit, objective = rl.ppo(build, config.kl, value_weight=config.value_weight)
        batches = collect(
            prompts(2 * config.batch_size), reward(config.partial_reward), credit, updates=2, epochs=2,
            ref_params=start,
        )  # fmt: skip
        params = with_value_head(model, start)
    elif name == "online_st":
        half = prompts(config.batch_size // 2)
        own = collect(half, reward(), rl.right_samples)
        objective = rl.online_self_training(model.forward)
        batches = with_gold(own, half, workings.supervised_rows(rows))
    else:
        objective = supervised(model.forward)
        if name == "offline_st":
            rows = own_rows(config, model, start, pairs, rows, seed)
        batches = arithmetic.batches_of(rows, seed, config.batch_size)
    state, history = train.fit(
        params,
        objective,
        arithmetic.policy_optimizer(config.learning_rate),
        batches,
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


def own_answers(config, model, start, pairs, seed) -> tuple[list[str], list, list]:
    """(questions, the warm-up model's answers to each, whether each of these is right)."""
    texts = answers(config, model, start, pairs, config.own, seed)
    right = answer_reward(
        functools.partial(workings.result, digits=config.digits), numbers_equal, partial=0.0
    )
    records = [{"answer": total} for total in pairs.sum(axis=1)]
    correct = [
        [right(text, r) == 1 for text in some] for some, r in zip(texts, records, strict=True)
    ]
    return [workings.question(*pair, config.digits) for pair in pairs], texts, correct


def own_rows(config, model, start, pairs, rows, seed) -> dict[str, np.ndarray]:
    """Rows of the annotated workings, and of the warm-up model's own right ones, each once."""
    asked, texts, correct = own_answers(config, model, start, pairs, seed)
    gold = [
        arithmetic.decode(tokens, mask > 0)
        for tokens, mask in zip(rows["tokens"], rows["loss_mask"], strict=True)
    ]
    kept = rl.offline_collect(texts, correct, gold)
    return arithmetic.layout([asked[i] for i, _ in kept], [text for _, text in kept])


def ranker(config, model, start, pairs, seed) -> Callable[[Any, Any], list]:
    """rank(questions, texts): scores by a classifier trained on the warm-up model's own answers."""
    judged = own_answers(config, model, start, pairs, seed)
    params = reranker.train_reranker(
        model, start, *judged, steps=config.steps, batch_size=config.batch_size,
        learning_rate=config.learning_rate, seed=seed,
    )  # fmt: skip
    return functools.partial(reranker.scores, model, params)


def answers(config, model, params, pairs, samples, seed, temperature=1.0) -> list[list[str]]:
    """`samples` texts to each question."""
    asked = arithmetic.encode([workings.question(*pair, config.digits) for pair in pairs])
    sampling = dataclasses.replace(workings.sampling(config.digits), temperature=temperature)
    drawn = rl.sample_on_device(model, params, asked, jax.random.key(seed), sampling, samples)
    rows = zip(*drawn, strict=True)
    return [[arithmetic.decode(t, m) for t, m in zip(*row, strict=True)] for row in rows]


def measures(
    config: Config, model: Decoder, pairs: np.ndarray, seed: int, rank: Any = None
) -> Callable[[Any, int], dict[str, Any]]:
    """Returns measure(params, samples): accuracy of greedy answers, samples, votes; fractions of kinds.

    With `rank`, also the accuracy of the answer that it scores highest.
    """
    asked = [workings.question(*pair, config.digits) for pair in pairs]
    records = [{"answer": total} for total in pairs.sum(axis=1)]
    parse = functools.partial(workings.result, digits=config.digits)
    right = answer_reward(lambda text: text, numbers_equal, partial=0.0)

    def accuracy(found):
        verdicts = [0.0 if f is None else right(f, r) for f, r in zip(found, records, strict=True)]
        return float(np.mean(verdicts))

    def measure(params, samples):
        greedy = answers(config, model, params, pairs, 1, seed, temperature=0.0)
        texts = answers(config, model, params, pairs, samples, seed)
        found = [[parse(text) for text in some] for some in texts]
        firsts = [text[:1] for some in texts for text in some]
        chosen = {}
        if rank is not None:
            ranked = zip(rank(asked, texts), found, strict=True)
            chosen = {"rerank": accuracy([rerank(*pair) for pair in ranked])}
        return chosen | {
            "greedy": accuracy([parse(text) for (text,) in greedy]),
            "sampled": float(np.mean([accuracy(column) for column in zip(*found, strict=True)])),
            "vote": accuracy([majority_vote(some) for some in found]),
            "kinds": [firsts.count(kind) / len(firsts) for kind in config.kinds],
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
            "ReFT is above SFT that went on for as many examples (greedy, held out)",
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
