"""Learning to Generate Better Than Your LLM (arXiv 2306.11816).

Reinforcement learning with guided feedback: a stronger model, the guide, writes the beginning of a
response (PPO++), its end (AggreVaTeD), or both in turn (LOLS, D2LOLS), and the policy learns from its
own tokens by PPO.

    python experiments/papers/rlgf.py       after an interruption, again: finished seeds are kept
    python experiments/papers/rlgf.py --preset full     Qwen2.5-0.5B, guided by 1.5B, on GSM8K
    python experiments/papers/rlgf.py --preset full --model a --guide-model b --data workings.jsonl

The task is to write a word of five letters backwards, with reward 1 only if the whole answer is right.
The learner is pretrained until that has probability 0.1; the guide is the same model, pretrained until 0.7.
All methods start at the learner of a seed and take as many optimizer steps on as many responses; a guided
response costs up to twice the samples, as roll-ins are sampled whole. pass@1 is the exact probability of the
right answer to held-out words. A run takes 6 minutes of processor time; that of the record had other work
beside it.

An earlier setting had been recorded on the same seeds: learner 0.02, 50 rollouts of 4 steps at 3e-4, weight
of the critics 0.5. There PPO left its start of 0.034 on one seed of three (0.025, 0.025, 0.224), and no
method ended above it: PPO++ 0.052, LOLS 0.050, D2LOLS 0.058, AggreVaTeD 0.000. This setting was then chosen
on seed 100, because PPO learns in it: learning rate 1e-3, two steps per rollout, weight 0.1, 100 rollouts.
There PPO went from 0.12 to 0.59 in 60 rollouts and PPO++ to 0.27; from a learner at 0.05, PPO to 0.88 in 120
rollouts and PPO++ to 0.02. With answers of a fixed length, without an end, AggreVaTeD ended at 0.001.

In the recorded run (docs/results.md), seeds 0 to 2, PPO learns on every seed, from 0.143 to 0.793 (the guide
has 0.729), and no guided variant ends above it: PPO++ 0.504, LOLS 0.350, D2LOLS 0.223, AggreVaTeD 0.000. The
probability of each right token after right ones shows why. AggreVaTeD's policy learns its first letter (0.90
to 0.99) and forgets the rest, which the guide writes for it: the third to fifth letter fall to 0.00, 0.00
and 0.03, while the reward stays at 0.75. D2LOLS spends its first fifth on that and repairs it by PPO++. PPO++
learns the last letter (0.86 to 0.98), as its roll-ins begin right; the first one, which the policy writes in
a fifth of the responses only, does not improve (0.90 to 0.87), so that whole answers improve less than with
PPO. Our claim that it gets worse on every seed fails, and so does ours that AggreVaTeD unlearns the end mark.
The authors add a cross-entropy of reference answers against forgetting, which would be supervised learning of
the task here.

The authors' code (Cornell-RL/tril) differs from the paper's description: its buffers get the rewards
without the KL penalty, and in its IMDB runs the policy starts at the guide's own weights. Departures:
policy and both critics share one network (theirs are separate); no decay of the learning rate; no KL, as
in the authors' CommonGen; at the small size no cross-entropy of reference answers, as these are the right
answers here, so that it would be supervised learning of the task (--reference-weight turns it on).

`--preset full` measures the same on GSM8K with a reward of 1 for a right result, sizes of the authors'
CommonGen runs (500 rollouts of 128 responses, 4 epochs of 4 updates, learning rate 5e-6, guide at top-p
0.92, weight 0.1 of references). The paper's own tasks need a DistilBERT classifier (IMDB), CIDEr and SPICE
(CommonGen) or GPT-J (TL;DR), which jaxft does not have.
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
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, mean, show
from experiments.lab.figures import plot_band
from experiments.lab.seeds import begin, measure_claims
from experiments.worlds import arithmetic, documents, questions, words
from jaxft import rl, train
from jaxft.generation import SamplingConfig, generate
from jaxft.models import Decoder
from jaxft.objectives import completion_log_probs
from jaxft.rl.guided import d2lols, guide_begins, guide_ends, lols
from jaxft.rl.rollouts import judged
from jaxft.rl.two_critics import with_critics, without_critics

METHODS = ("PPO", "PPO++", "AggreVaTeD", "LOLS", "D2LOLS")
LAST = 10  # rollouts over which the last rewards are averaged
GSM8K = questions.Settings(
    model="Qwen/Qwen2.5-0.5B", data="openai/gsm8k?name=main",
    eval_data="openai/gsm8k?name=main&split=test", max_new_tokens=512, sampled_at_once=128,
    trained_at_once=32,
)  # fmt: skip
FULL = dict(
    rollouts=500, responses=128, updates=4, epochs=4, learning_rate=5e-6, reference_weight=0.1,
    value_weight=0.1, gamma=1.0,
)  # fmt: skip
SMOKE: dict[str, Any] = dict(
    seeds=1, learner=0.0, guide=0.0, words=64, held_out=8, rollouts=2, responses=8, updates=1,
    epochs=2, guided_first=0.5, width=32, layers=1, guide_model="tiny",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    learner: float = 0.1  # probability of a right answer at which the learner's pretraining ends
    guide: float = 0.7  # and that of the guide
    words: int = 20_000  # words to train on
    held_out: int = 1000  # words that measure accuracy
    rollouts: int = 100  # rollouts of each method
    responses: int = 128  # responses of a rollout, one to each question
    updates: int = 1  # parts of a rollout, one optimizer step each
    epochs: int = 2  # passes over a rollout
    learning_rate: float = 1e-3  # learning rate of all methods
    mix: float = 0.8  # share of the responses that have a roll-in
    tau: float = 0.8  # share of LOLS's rollouts that are PPO++'s
    guided_first: float = 0.2  # share of D2LOLS's rollouts, its first, that are AggreVaTeD's
    gamma: float = 0.99  # discount per token
    value_weight: float = 0.1  # weight of the critics' loss
    reference_weight: float = 0.0  # weight of the cross-entropy of reference answers
    width: int = 48  # width of the model
    layers: int = 2  # layers of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/rlgf"
    preset: Literal["small", "full"] = "small"  # full: models from the hub, questions and sizes
    guide_model: str = "Qwen/Qwen2.5-1.5B"  # the guide of --preset full: directory or hub id
    source: questions.Settings = GSM8K
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    small = ("learner", "guide", "words", "held_out", "width", "layers")
    config = questions.sized(config, FULL, SMOKE, only_full=("guide_model",), only_small=small)
    with opened(config) as world:
        run = functools.partial(run_seed, config, world)
        return measure_claims(
            this, config, run, judge=judge, print_table=print_table, figure=_figure
        )


class World(NamedTuple):
    """A learner, a guide with the same tokens, and questions with reference answers."""

    model: Decoder
    start: Any  # params of the learner
    guide: rl.guided.Writer
    guide_measures: dict[str, Any]
    known: rl.Asked  # ids and records of the questions to train on
    references: dict[str, np.ndarray]  # supervised rows of their answers
    sampling: SamplingConfig
    sampler: Callable[..., Any]
    judge: rl.guided.Judge
    # params -> {"pass@1"} of held-out questions, and "tokens", of each right token after right ones
    measure: Callable[[Any], dict[str, Any]]
    collect: Callable[..., rl.Collector]
    fit: Callable[..., tuple]  # `fit` of (params, objective, learning rate, batches, rows, ...)


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: words or, with --preset full, the source's questions."""
    if config.preset != "full":
        yield functools.partial(reversal, config)
        return
    with questions.opened(config.source, documents.worked) as task:
        model, params = questions.beside(task, config.guide_model)
        sampler, records = questions.sampler(task), task.known.records
        nucleus = dataclasses.replace(task.sampling, top_p=0.92)
        guide = rl.writer(model, nucleus, params, sampler=sampler)
        references = documents.lay_out(task, records, [r["completion"] for r in records])

        def measure(task, params, seed):
            _, right = questions.graded(task, params, task.held_out, 1, seed)
            return {"pass@1": float(right.mean())}

        def world(seed):
            return World(
                task.model, task.params, guide, measure(task._replace(model=model), params, seed),
                task.known, references, task.sampling, sampler,
                judged(task.renderer.tokenizer, task.rewards),
                functools.partial(measure, task, seed=seed),
                functools.partial(questions.collected, task), functools.partial(questions.fit, task),
            )  # fmt: skip

        yield world


def reversal(config: Config, seed: int) -> World:
    """Returns the world of words to write backwards, whose pass@1 is exact."""
    drawn = words.words(np.random.default_rng(seed), config.words + config.held_out)
    pairs = [words.questions("reverse", x) for x in np.split(drawn, [config.words])]
    seen = lambda rows: {"completion_mask": rows["loss_mask"][:, words.SIZE :] > 0}
    rows, held_out = ((r := words.rows_of(pair)) | seen(r) for pair in pairs)
    model, params = arithmetic.small_model(
        jax.random.key(seed), config.width, 32, words.VOCABULARY, config.layers
    )
    log_probs = jax.jit(functools.partial(completion_log_probs, model.forward))
    some = {k: x[:500] for k, x in rows.items()}
    right = lambda params: float(np.exp(np.sum(log_probs(params, some), axis=1)).mean())
    pretrain = functools.partial(arithmetic.warm_start, model, rows=rows, measure=right)
    start, steps = pretrain(params=params, seed=seed, until=config.learner)
    better, more = pretrain(params=start, seed=seed + 1, until=config.guide)
    print(f"seed {seed}: {steps} steps of the learner, {more} more of the guide", flush=True)

    def measure(params):
        found = np.asarray(log_probs(params, held_out))
        each = np.exp(found).mean(axis=0).tolist()
        return {"pass@1": float(np.exp(found.sum(axis=1)).mean()), "tokens": each}

    def fit(params, objective, rate, batches, rows, **more):
        return train.fit(params, objective, arithmetic.policy_optimizer(rate), batches, **more)

    prompts, answers = (x.tolist() for x in pairs[0])
    sampling = SamplingConfig(words.SIZE, stop_ids=(words.END,))
    same = lambda found, records: [
        float(a == r["answer"]) for a, r in zip(found, records, strict=True)
    ]
    known = rl.Asked(prompts, [{"answer": answer} for answer in answers])
    return World(
        model, start, rl.writer(model, sampling, better), measure(better), known,
        {name: rows[name] for name in ("tokens", "segment_ids", "positions", "loss_mask")},
        sampling, generate, same, measure, rl.collect, fit,
    )  # fmt: skip


def run_seed(config: Config, world: Callable[[int], World], seed: int) -> dict[str, Any]:
    """{"start": measures, "guide": measures, "methods": {name: row}} from one learner and guide."""
    world = world(seed)
    first, parts = round(config.guided_first * config.rollouts), {}
    schedules = (guide_begins, guide_begins, guide_ends, lols(config.tau), d2lols(first))
    run = {"start": world.measure(world.start), "guide": world.guide_measures}
    chosen = slice(None, None, 4) if config.smoke else slice(None)  # PPO and D2LOLS in a smoke run
    for name, schedule in list(zip(METHODS, schedules, strict=True))[chosen]:
        mix = 0.0 if name == "PPO" else config.mix
        parts[name] = train_method(config, world, schedule, mix, seed)
        print(f"    {name}: pass@1 {parts[name]['pass@1']:.3f}", flush=True)
    return run | {"methods": parts}


def train_method(config, world, schedule, mix, seed) -> dict[str, Any]:
    """{"pass@1", "tokens", "reward", "guide_tokens", "curve"} of one method."""
    forward, steps = world.model.forward, config.updates * config.epochs
    policy = rl.writer(world.model, world.sampling, sampler=world.sampler)
    sample = rl.guided_answers(
        world.model, policy, world.guide, world.judge, schedule,
        size=world.sampling.max_new_tokens, mix=mix,
    )  # fmt: skip
    credit, objective = rl.guided_ppo(forward, gamma=config.gamma, value_weight=config.value_weight)
    ids, records = world.known[:2]
    prompts = rl.Prompts(ids, config.responses, records, seed=seed)
    if config.reference_weight:
        sample = with_answers(sample, prompts, world.references)
        objective = rl.with_references(objective, forward, config.reference_weight)
    every = max(1, config.rollouts // 5) * steps
    measure = lambda state: world.measure(without_critics(state.params))
    rate = lambda state: {"pass@1": measure(state)["pass@1"]}
    state, history = world.fit(
        with_critics(world.model, world.start),
        objective,
        config.learning_rate,
        world.collect(
            prompts, sample, credit, rl.add_guided_policy(forward, 1.0),
            updates=config.updates, epochs=config.epochs,
        ),
        config.responses // config.updates,
        steps=config.rollouts * steps,
        key=jax.random.key(seed),
        callbacks=[train.every(every, rate)],
    )  # fmt: skip
    return measure(state) | {
        "reward": float(np.mean([row["reward"] for row in history[-LAST * steps :]])),
        "guide_tokens": float(np.mean([row["guide_tokens"] for row in history])),
        "curve": [(row["step"] // steps, row["pass@1"]) for row in history if "pass@1" in row],
    }


def with_answers(sample: rl.Sample, prompts: rl.Prompts, references: dict) -> rl.Sample:
    """The sampler, whose batches also have the reference answers to their questions."""

    def both(params, asked, key):
        chosen = prompts.chosen(asked.number)
        rows = {name: x[chosen] for name, x in references.items()}
        return sample(params, asked, key) | {"references": rows}

    return both


def judge(runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    of = lambda name: np.array([run["methods"][name]["pass@1"] for run in runs])
    guide = np.array([run["guide"]["pass@1"] for run in runs])
    start = np.array([run["start"]["pass@1"] for run in runs])
    above = [
        Claim(
            f"{name} ends above PPO (held-out pass@1)",
            "above PPO on IMDB, CommonGen and TL;DR",
            [mean(of(name) - of("PPO"), "above", 0)],
            f"{of('PPO').mean():.3f} -> {of(name).mean():.3f}",
        )
        for name in list(runs[0]["methods"])[1:]
    ]
    if len(above) < len(METHODS) - 1:  # a smoke run
        return above
    best = np.maximum(of("PPO++"), of("D2LOLS")) - np.maximum(of("AggreVaTeD"), of("LOLS"))
    surpass = [mean(of(name) - guide, "above", 0, label=name) for name in ("PPO++", "D2LOLS")]
    return [
        *above,
        Claim(
            "the better of PPO++ and D2LOLS ends above the better of AggreVaTeD and LOLS",
            "usually best",
            [mean(best, "above", 0, by="estimate")],
        ),
        Claim(
            "the policy surpasses its guide",
            "yes",
            surpass,
            f"start {start.mean():.3f}, guide {guide.mean():.3f}",
        ),
        *mechanism(runs),
    ]


def mechanism(runs: list[dict]) -> list[Claim]:
    """Returns our claims on which tokens each method learns; none for texts, which have no such measure."""
    if "tokens" not in runs[0]["start"]:
        return []
    before = np.array([run["start"]["tokens"] for run in runs])
    after = {m: np.array([run["methods"][m]["tokens"] for run in runs]) for m in METHODS}
    moved = lambda method, place: after[method][:, place] - before[:, place]
    shown = lambda x: " ".join(f"{value:.2f}" for value in x.mean(axis=0))
    detail = lambda method: f"by token {shown(before)} -> {shown(after[method])}"
    learned = [run["methods"]["PPO"]["pass@1"] - run["start"]["pass@1"] for run in runs]
    return [
        Claim(
            "PPO learns: it ends above its start",
            "(ours)",
            [mean(learned, "above", 0)],
            detail("PPO"),
        ),
        Claim(
            "PPO++ learns the last letter of an answer, and forgets the first",
            "(ours)",
            [
                mean(moved("PPO++", -2), "above", 0, label="last"),
                mean(moved("PPO++", 0), "below", 0, label="first"),
            ],
            detail("PPO++"),
        ),
        Claim(
            "AggreVaTeD learns the first letter of an answer, and forgets its end",
            "(ours)",
            [
                mean(moved("AggreVaTeD", 0), "above", 0, label="first"),
                mean(moved("AggreVaTeD", -1), "below", 0, label="end"),
            ],
            detail("AggreVaTeD"),
        ),
    ]


def print_table(runs: list[dict]) -> None:
    """Measures of each method on held-out questions, means over seeds, and pass@1 against PPO's."""
    table = Table("method", "pass@1", "reward", "guide's tokens", "pass@1 above PPO's")
    rows = {name: [run[name] for run in runs] for name in ("start", "guide")}
    rows |= {name: [run["methods"][name] for run in runs] for name in runs[0]["methods"]}
    for name, found in rows.items():
        cells = [
            f"{np.mean([row[m] for row in found]):.3f}" if m in found[0] else ""
            for m in ("pass@1", "reward", "guide_tokens")
        ]
        above = [
            r["pass@1"] - run["methods"]["PPO"]["pass@1"]
            for r, run in zip(found, runs, strict=True)
        ]
        table.add_row(name, *cells, show(above))
    Console(width=140).print(table)


def _figure(runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes, right = figure.subplots(1, 2)
    for name in runs[0]["methods"]:
        first = [[(0, run["start"]["pass@1"]), *run["methods"][name]["curve"]] for run in runs]
        steps, values = np.moveaxis(np.array(first), -1, 0)
        plot_band(axes, steps[0], values, label=name)
    axes.axhline(
        np.mean([run["guide"]["pass@1"] for run in runs]), color="k", ls=":", label="guide"
    )
    axes.set(xlabel="rollout", title="held-out pass@1: mean over seeds, 95 % interval")
    axes.legend(fontsize=7)
    rows = {"start": [run["start"] for run in runs]}
    rows |= {name: [run["methods"][name] for run in runs] for name in runs[0]["methods"]}
    for name, found in rows.items():
        if tokens := [row["tokens"] for row in found if "tokens" in row]:
            style = dict(color="k", ls=":") if name == "start" else {}
            right.plot(range(1, 1 + len(tokens[0])), np.mean(tokens, axis=0), label=name, **style)
    right.set(xlabel="token of the answer", title="probability of the right token at the end")
    figure.savefig(output / "rlgf.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
