"""pPE: Prior Prompt Engineering for Reinforcement Fine-Tuning (arXiv 2505.14157).

The prior prompt is the instruction before every question of reinforcement fine-tuning. Five of them ask for
reasoning, a plan, code, knowledge or examples, each with its own tag. The same GRPO with each gives
models of different behaviour, all better than the start with the same prompt.

    python experiments/papers/ppe.py
    python experiments/papers/ppe.py --preset full   Qwen2.5-7B on STILL-3's questions, 8 GPUs of 80 GB
    python experiments/papers/ppe.py --preset full --model Qwen/Qwen2.5-1.5B --data questions.jsonl

The task is the addition of two numbers below 50 in five styles, asked for by the first character of the
question (experiments/worlds/styles.py). A model of 0.1 M parameters is pretrained on documents of which 70 %
follow the style that is asked for, 25 % have a wrong answer and 15 % a malformed tag. GRPO then trains one
model with each prior prompt, with the reward ½ accuracy + ½ format of the paper: all from the same params of
a seed, on the same questions in the same order. All measurements use samples at temperature 1 for held-out
questions: with a model's own prior prompt, and without one, where a style that is used has become the model's
own. As a control, one model has the prompt of "think" and the format reward of "code".

In the recorded run (docs/results.md), seeds 0 to 2, GRPO with four of the prior prompts gains 0.18 to 0.29 of
accuracy, on each seed, and all five models keep to the format (0.99). The claim for all five fails: with
"plan" the interval of the gain includes 0 (0.183 [-0.034, 0.400]), and with "examples" accuracy falls from
0.182 to 0.089. An invented example leaves the sum to be computed in one step: presumably its rare successes
count less than the format. Without a prompt, each model answers in the style that it was trained with, in
0.82 to 0.92 of its responses, the start in 0.2. The control has the style of its reward, not of its prompt:
with any prompt, at least 0.96 of its responses begin with the tag of "code".

The sizes were chosen on seed 100: five minutes of processor time, of which the record's minutes are a
multiple, because other work ran beside it. Numbers below 100 and a model of width 96 took 20 minutes.

Which style is best is a property of Qwen2.5-7B in the paper, and here of how the documents were written:
it is shown, not judged. The wording of the prompts and the hyperparameters of `--preset full` are ours,
because the paper's are not public (jaxft/data/prior_prompts.py); its behaviours are found by rules, the
paper's by a language model.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import flags, limits
from experiments.lab.claims import Claim, mean
from experiments.lab.figures import bar_means
from experiments.lab.seeds import begin, measure_claims
from experiments.worlds import arithmetic, questions, styles
from jaxft import rl, train
from jaxft.analysis.behaviours import BEHAVIOURS, behaviour_rates, js_divergence
from jaxft.data.prior_prompts import PRIOR_PROMPTS
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient
from jaxft.rewards import SeveralRewards, tag_format_reward

NAMES = tuple(prior.name for prior in PRIOR_PROMPTS)
LETTER = dict(zip(NAMES, styles.STYLES, strict=True))
NO_PROMPT = "none"
WRONG_TAG = "think, rewarded for code"
STILL = questions.Settings(
    model="Qwen/Qwen2.5-7B", data="RUC-AIBOX/STILL-3-Preview-RL-Data", max_prompt=768,
    max_new_tokens=4096,
)  # fmt: skip
FULL = dict(steps=200, prompts_per_step=128, learning_rate=1e-6, held_out=200)
SMOKE = dict(
    seeds=1, pretrain_steps=2, steps=2, prompts_per_step=2, group_size=4, held_out=8, samples=2, width=32,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    numbers: int = 50  # sums of two numbers below this
    pretrain_steps: int = 1000  # steps of pretraining on 32 documents
    pretrain_rate: float = 4e-3  # their learning rate, at its highest
    share: float = 0.7  # probability that a document follows the prior prompt; else any style
    steps: int = 60  # steps of GRPO with each prior prompt
    prompts_per_step: int = 16  # questions per step
    group_size: int = 8  # answers to each question
    learning_rate: float = 1e-3  # learning rate of GRPO
    held_out: int = 256  # held-out questions
    samples: int = 2  # answers to each of them
    width: int = 64  # width of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/ppe"
    preset: Literal["small", "full"] = "small"  # full: the paper's model, questions and sizes
    source: questions.Settings = STILL
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    only_small = ("numbers", "pretrain_steps", "pretrain_rate", "share", "width")
    config = questions.sized(config, FULL, SMOKE, only_small=only_small)
    with opened(config) as world:
        few = config.smoke and config.preset == "full"
        run = functools.partial(run_seed, world, names=NAMES[:2] if few else NAMES)
        return measure_claims(
            this, config, run, judge=judge, print_table=print_table, figure=_figure
        )


class World(NamedTuple):
    """A start, how it trains with a prior prompt and a rewarded tag, and how answers are measured."""

    start: Any  # params
    train: Callable[[str, str], tuple[Any, list[dict]]]  # (prompt, tag) -> (params, history)
    # (params, prompt or NO_PROMPT, tag) -> "accuracy", "format", "shares" and, of texts, "behaviours"
    measure: Callable[[Any, str, str], dict[str, Any]]


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: sums by a small model, or with --preset full the source's questions."""
    if config.preset != "full":
        yield functools.partial(sums, config)
        return
    with questions.opened(config.source) as task:
        yield functools.partial(problems, config, task)


def sums(config: Config, seed: int) -> World:
    """Returns the world of sums in five styles, with a model pretrained for the seed."""
    rng = np.random.default_rng(seed)
    pairs = np.stack(np.divmod(rng.permutation(config.numbers**2), config.numbers), axis=1)
    held_out, known = pairs[: config.held_out], pairs[config.held_out :]
    model, params = arithmetic.small_model(
        jax.random.key(seed), config.width, vocabulary=len(styles.ALPHABET)
    )
    params = styles.pretrained(
        model, params, known, rng, steps=config.pretrain_steps, batch_size=32,
        rate=config.pretrain_rate, own=config.share, seed=seed,
    )  # fmt: skip
    asked = lambda prompt, pairs: styles.asked(LETTER.get(prompt, styles.NONE), pairs)
    credit, optimizer, step = learner(model, config.group_size, config.learning_rate)
    totals, right = known.sum(axis=1), styles.right(held_out.sum(axis=1))
    numbers = np.repeat(np.arange(len(held_out)), config.samples)

    def trained(prompt, tag):
        prompts = rl.Prompts(asked(prompt, known), config.prompts_per_step, seed=seed)
        batches = rl.collect_on_device(
            model, prompts, styles.combined(LETTER[tag], totals), credit, styles.sampling(),
            group_size=config.group_size,
        )  # fmt: skip
        state = train.init_state(params, optimizer, jax.random.key(seed))
        state, history = train.run_steps(state, step, batches, steps=config.steps)
        return state.params, history

    def measure(params, prompt, tag):
        tokens, mask = rl.sample_on_device(
            model, params, asked(prompt, held_out), jax.random.key(seed), styles.sampling(),
            config.samples,
        )  # fmt: skip
        rows = [x.reshape(-1, x.shape[-1]) for x in (tokens, mask)]
        return {
            "accuracy": float(np.mean(right(*rows, numbers))),
            "format": float(np.mean(styles.well_formed(LETTER[tag], *rows))),
            "shares": styles.shares(tokens),
        }

    return World(params, trained, measure)


@functools.cache
def learner(model: Decoder, group_size: int, learning_rate: float) -> tuple[Any, Any, Any]:
    """(credit, optimizer, step) of GRPO, which all prior prompts and seeds share: compiled once."""
    algorithm = rl.grpo(functools.partial(policy_gradient, model.forward), group_size)
    optimizer = arithmetic.policy_optimizer(learning_rate)
    return algorithm.credit, optimizer, jax.jit(train.make_step(algorithm.objective, optimizer))


def problems(config: Config, task: questions.Task, seed: int) -> World:
    """Returns the world of the task's questions, with the prior prompts as text."""
    prior = {one.name: one for one in PRIOR_PROMPTS}

    def styled(asked, prompt):
        if prompt == NO_PROMPT:
            return asked
        records = [prior[prompt].applied(record) for record in asked.records]
        return questions.asked(task.settings, task.renderer, records)

    def trained(prompt, tag):
        form = tag_format_reward(prior[tag].tags)
        own = task._replace(
            known=styled(task.known, prompt),
            rewards=SeveralRewards((task.rewards, form), (0.5, 0.5)),
        )
        build = functools.partial(policy_gradient, task.model.forward)
        return questions.reinforce(
            own, rl.grpo(build, config.group_size), steps=config.steps, seed=seed,
            learning_rate=config.learning_rate, prompts_per_step=config.prompts_per_step,
            group_size=config.group_size,
        )  # fmt: skip

    def measure(params, prompt, tag):
        asked = styled(task.held_out, prompt)
        some = rl.Asked(asked.ids[: config.held_out], asked.records[: config.held_out])
        texts, right = questions.graded(task, params, some, config.samples, seed)
        texts = [text for answers in texts for text in answers]
        begins = np.array([[text.startswith(f"<{name}>") for name in NAMES] for text in texts])
        used = begins.mean(axis=0).tolist()
        return {
            "accuracy": float(right.mean()),
            "format": float(np.mean(tag_format_reward(prior[tag].tags)(texts, asked.records))),
            "shares": [*used, max(1.0 - sum(used), 0.0)],
            "behaviours": behaviour_rates(texts),
        }

    return World(task.params, trained, measure)


def run_seed(
    world: Callable[[int], World], seed: int, names: Sequence[str] = NAMES
) -> dict[str, Any]:
    """{"start": {prompt: measures}, "trained": {prompt: {"own", "none", "others"}}} of one start."""
    world = world(seed)
    start = {name: world.measure(world.start, name, name) for name in names}
    start[NO_PROMPT] = world.measure(world.start, NO_PROMPT, NAMES[0])
    trained = {}
    for name, prompt, tag in [*((x, x, x) for x in names), (WRONG_TAG, "think", "code")]:
        params, history = world.train(prompt, tag)
        if not any(row["reward"] for row in history):
            print(f"seed {seed}, {name}: no answer had a reward; nothing was learned.", flush=True)
        others = [world.measure(params, other, tag)["shares"] for other in names if other != prompt]
        trained[name] = {
            "own": world.measure(params, prompt, tag),
            "none": world.measure(params, NO_PROMPT, tag),
            "others": np.mean(others, axis=0).tolist(),
        }
        print(f"seed {seed}, {name}: accuracy {trained[name]['own']['accuracy']:.3f}", flush=True)
    return {"start": start, "trained": trained}


def distance(vectors: list[list[float]]) -> float:
    """Mean Jensen-Shannon divergence of all pairs, in nats."""
    return float(np.mean([js_divergence(*pair) for pair in itertools.combinations(vectors, 2)]))


def own_share(run: dict, name: str, prompt: str) -> float:
    """The fraction of a trained model's responses in the style of its prior prompt."""
    return run["trained"][name][prompt]["shares"][NAMES.index(name)]


def trained_with(runs: list[dict]) -> list[str]:
    """The prior prompts of the runs: all five, except in a smoke run."""
    return [name for name in NAMES if name in runs[0]["trained"]]


def judge(runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    names = trained_with(runs)
    own = lambda name, metric: np.array([run["trained"][name]["own"][metric] for run in runs])
    gains = {n: own(n, "accuracy") - [r["start"][n]["accuracy"] for r in runs] for n in names}
    apart = [distance([run["trained"][n]["none"]["shares"] for n in names]) for run in runs]
    before = [distance([run["start"][n]["shares"] for n in names]) for run in runs]
    alone = {n: [own_share(run, n, "none") for run in runs] for n in names}
    return [
        Claim(
            "RL with a prior prompt is more accurate than the start with it", "for all five",
            [mean(gains[n], "above", 0, label=n) for n in names],
        ),
        Claim(
            "and keeps to the format", "not given",
            [mean(own(n, "format"), "at least", 0.95, by="estimate", label=n) for n in names],
        ),
        Claim(
            "without a prompt, the model uses the style it was trained with", "styles stay distinct",
            [mean(alone[n], "above", 0.3, label=n) for n in names],
        ),
        Claim(
            "distance of the five models' styles without a prompt, nats", "above 0",
            [mean(apart, "above", 0.05)],
            f"of the start under its five prompts: {np.mean(before):.3f}",
        ),
    ]  # fmt: skip


def print_table(runs: list[dict]) -> None:
    """Means over seeds of each model, before and after, with its prompt, other prompts and without."""
    table = Table(
        "prior prompt", "accuracy before", "after", "format before", "after", "own style before",
        "after", "under other prompts", "without a prompt",
    )  # fmt: skip
    for name in runs[0]["trained"]:
        prompt, tag = (name, name) if name in NAMES else ("think", "code")
        place = NAMES.index(tag)
        before = [run["start"][prompt] for run in runs]
        after = [run["trained"][name] for run in runs]
        values = [
            [x["accuracy"] for x in before], [x["own"]["accuracy"] for x in after],
            [x["format"] for x in before], [x["own"]["format"] for x in after],
            [x["shares"][place] for x in before], [x["own"]["shares"][place] for x in after],
            [x["others"][place] for x in after], [x["none"]["shares"][place] for x in after],
        ]  # fmt: skip
        table.add_row(name, *(f"{np.mean(x):.3f}" for x in values))
    Console(width=140).print(table)
    if "behaviours" in runs[0]["start"][NO_PROMPT]:
        _print_behaviours(runs)


def _print_behaviours(runs):
    names = trained_with(runs)
    table = Table("behaviour, with the own prompt: before -> after", *names)
    rate = lambda row, name: row["behaviours"][name]
    for behaviour in BEHAVIOURS:
        pairs = [
            (
                np.mean([rate(run["start"][name], behaviour) for run in runs]),
                np.mean([rate(run["trained"][name]["own"], behaviour) for run in runs]),
            )
            for name in names
        ]
        table.add_row(behaviour, *(f"{a:.2f} -> {b:.2f}" for a, b in pairs))
    Console(width=140).print(table)


def _figure(runs, output):
    from matplotlib.figure import Figure

    names, figure = trained_with(runs), Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    gains = [
        [run["trained"][n]["own"]["accuracy"] - run["start"][n]["accuracy"] for n in names]
        for run in runs
    ]
    bar_means(left, names, gains)
    left.set(title="accuracy gained with the own prompt")
    bar_means(right, names, [[own_share(run, n, "none") for n in names] for run in runs])
    right.axvline(
        np.mean([run["start"][NO_PROMPT]["shares"][:5] for run in runs]), color="k", ls=":"
    )
    right.set(title="own style without a prompt", xlim=(0, 1.05))
    figure.savefig(output / "ppe.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
