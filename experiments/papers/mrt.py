"""MRT: Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning (arXiv 2503.07572).

An answer's reasoning is a sequence of episodes. Beside the reward for a right result, MRT rewards each
episode's progress: the change of the chance of a right result if the model had to answer now. Training on the
outcome does not see which tokens were useless; MRT lowers the regret over tokens.

    python experiments/papers/mrt.py
    python experiments/papers/mrt.py --methods grpo mrt_online
    python experiments/papers/mrt.py --preset full     DeepSeek-R1-Distill-Qwen-1.5B on NuminaMath, 8 GPUs of 80 GB
    python experiments/papers/mrt.py --preset full --model Qwen/Qwen2.5-1.5B --data questions.jsonl

A question is a digit and four operations, each one of three fixed permutations of the digits. A model of 0.1 M
parameters is pretrained on answers that write the digit after each operation with filler segments between, and
on answers that are cut by a mark after which the result must be guessed. An episode is a segment of three
tokens. The regret is 1 minus the mean, over a budget of 33 tokens, of the chance of a right result when the
answer is cut there; it is computed from likelihoods, without sampling noise, on 8 samples for each of 200
held-out questions. All methods start from the same params of a seed.

    grpo         the outcome: group-normalised, clipped, mean over tokens
    grpo_lenpen  the same with a penalty of --penalty times length / 33 in the reward
    mrt_online   the outcome and alpha times the progress of a token's own episode, on the policy's own answers
    mrt_stale    from prefixes of the start's answers, half of a group continues and half must answer at once:
                 reward minus the mean of the second half
    star         fine-tuning on right samples of the start, without what follows the most progress

Budgets: tokens that are sampled or computed for forced answers count. mrt_online therefore has fewer questions
per step (--online-prompts) than the others; the table shows the tokens of each method.

The form of the stale prefix is the authors' README's "termination reward baseline"; how the paper normalises
the joint group, and that it samples prefixes uniformly, was read in summaries only. The authors' code for
training (version 0.1) was not compared.

`--preset full` has the authors' questions (4000 of NuminaMath-CoT, with AIME 2024 held out), model and limit of
16,384 tokens. Episodes begin at paragraphs such as "Wait"; chances come from --branches sampled answers after
"Time is up". Not in it: star, the authors' five benchmarks with 64 samples, and backtracking search. Sizes of a
step are not published; those here are ours. It was not run: no machine with such devices was at hand.
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
from experiments.worlds import arithmetic, permutations, questions
from jaxft import rl, train
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_mean
from jaxft.parallel import mesh_context
from jaxft.rl.forced import prefixes_of
from jaxft.rl.progress import shortened
from jaxft.rl.rollouts import rows_of
from jaxft.rl.token_losses import clipped, reinforce

Method = Literal["grpo", "grpo_lenpen", "mrt_online", "mrt_stale", "star"]
METHODS = Method.__args__
EPISODES = 6  # most episodes of a stale prefix
POINTS = 11  # of the curves over tokens
NUMINA = questions.Settings(
    model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    data="AI-MO/NuminaMath-CoT?limit=4000",
    eval_data="HuggingFaceH4/aime_2024",
    max_new_tokens=16384,
    sampled_at_once=64,
    trained_at_once=8,
)
STOP_TEXT = (
    "\n\nTime is up. I will give the answer that follows from what I have.\n</think>\n\n**Answer:** "
)
FULL = dict(
    steps=248, prompts_per_step=32, online_prompts=32, group_size=8, learning_rate=1e-6, held_out=30,
    samples=8, methods=METHODS[:4], penalty=0.5,
    fields={"question": "problem", "answer": "solution"},
    eval_fields={"question": "problem", "answer": "answer"},
)  # fmt: skip
SMOKE = dict(
    seeds=1, until=1e-9, steps=2, prompts_per_step=2, online_prompts=2, group_size=4, held_out=4,
    samples=2, width=32, layers=1, branches=1, answer_tokens=2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    methods: tuple[Method, ...] = METHODS
    until: float = 0.4  # probability of right digits at which pretraining ends
    steps: int = 60  # optimizer steps of each method
    prompts_per_step: int = 20  # questions per step
    online_prompts: int = 12  # the same of mrt_online, whose forced answers cost tokens too
    group_size: int = 8  # answers to each question
    learning_rate: float = 3e-4  # learning rate of all methods
    alpha: float = 1.0  # weight of progress in mrt_online
    penalty: float = 0.3  # subtracted from the reward of an answer of the largest length
    held_out: int = 200  # held-out questions
    samples: int = 8  # answers to each of them
    width: int = 64  # width of the model
    layers: int = 2  # layers of the model
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/mrt"
    preset: Literal["small", "full"] = "small"  # full: the paper's model, questions and sizes
    branches: int = 4  # with --preset full: sampled answers after each prefix
    answer_tokens: int = 1024  # with --preset full: tokens of a forced answer
    source: questions.Settings = NUMINA
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    config = questions.sized(
        config, FULL, SMOKE, only_full=("branches", "answer_tokens"),
        only_small=("until", "width", "layers"),
    )  # fmt: skip
    if config.preset == "full" and "star" in config.methods:
        raise ValueError("methods: --preset full has no star; leave it out.")
    if not set(config.methods) >= {"grpo"}:
        raise ValueError(f"methods: all are compared with grpo; got {config.methods}.")
    with opened(config) as world:
        run = functools.partial(run_seed, config, world)
        return measure_claims(
            this, config, run, judge=judge, print_table=print_table, figure=_figure
        )


class World(NamedTuple):
    """A model with questions, and how its answers are sampled, split and forced."""

    model: Decoder
    start: Any  # params from which all methods start
    known: rl.Asked
    held_out: rl.Asked
    sample: Callable[[int], rl.Sample]  # group size -> sampler of answers to questions
    sample_on: Callable[[int], rl.Sample]  # the same, of continuations of prefixes
    add_chances: rl.Transform
    forced: list[int]
    answer: int  # tokens of a forced answer
    limit: int  # tokens of an answer
    fit: Callable[..., tuple]  # (objective, batches, rows per step, **more), from the start
    filler: Callable[[dict], float] | None = None  # fraction of episodes without use, if known
    mesh: Any = None


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: permutations by a small model, or with --preset full the source's questions."""
    if config.preset != "full":
        yield functools.partial(digits, config)
        return
    with questions.opened(config.source) as task:
        yield lambda seed: problems(config, task)


def digits(config: Config, seed: int) -> World:
    """Returns the world of permuted digits, with a model pretrained for the seed."""
    task = permutations.task(
        seed, config.held_out, width=config.width, layers=config.layers
    )
    start, steps = permutations.started(task, seed, config.until)
    print(f"seed {seed}: {steps} steps of pretraining", flush=True)
    forced = arithmetic.encode([permutations.FORCED])[0]
    optimizer = arithmetic.policy_optimizer(config.learning_rate)
    longest = permutations.WIDTH + permutations.SEGMENT * EPISODES + len(forced)
    return World(
        task.model, start, task.known, task.held_out,
        permutations.answers(task.model), permutations.answers(task.model, longest),
        rl.add_chances(permutations.ends, rl.exact_chances(task.model, forced)), forced,
        2, permutations.LIMIT,
        lambda objective, batches, rows, **more: train.fit(start, objective, optimizer, batches, **more),
        permutations.filler,
    )  # fmt: skip


def problems(config: Config, task: questions.Task) -> World:
    """Returns the world of the task's questions; chances are estimated from samples."""
    tokenizer, sampler = task.renderer.tokenizer, questions.sampler(task)
    numbered = lambda asked: asked._replace(columns={"number": np.arange(len(asked.ids))})
    records = [*task.known.records, *task.held_out.records]
    known, held_out = numbered(task.known), numbered(task.held_out)
    held_out = held_out._replace(columns={"number": held_out.columns["number"] + len(known.ids)})

    def judge(completions, rows, batch):
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
        return task.rewards(texts, [records[n] for n in np.asarray(batch["number"])[rows]])

    forced = tokenizer.encode(STOP_TEXT, add_special_tokens=False)
    short = dataclasses.replace(task.sampling, max_new_tokens=config.answer_tokens)
    chances = rl.sampled_chances(task.model, judge, forced, short, config.branches, sampler=sampler)
    size = config.source.max_new_tokens

    def ends(batch):
        own = batch["completion_mask"]
        return rl.text_ends(tokenizer.decode, batch["tokens"][:, -own.shape[1] :], own, EPISODES)

    sample = lambda group_size: rl.answers(
        task.model, tokenizer, task.rewards, task.sampling, group_size, sampler=sampler
    )
    fit = lambda objective, batches, rows, **more: questions.fit(
        task, task.params, objective, config.learning_rate, batches, rows, **more
    )
    return World(
        task.model, task.params, known, held_out, sample, sample, rl.add_chances(ends, chances),
        forced, 1, size, fit, mesh=task.mesh,
    )  # fmt: skip


def run_seed(config: Config, world: Callable[[int], World], seed: int) -> dict[str, dict]:
    """{"start" or method: measures and tokens} of one start."""
    world = world(seed)
    runs = {"start": measure(config, world, world.start, seed) | {"tokens": 0}}
    for name in config.methods:
        params, tokens = METHOD[name](config, world, seed)
        runs[name] = measure(config, world, params, seed) | {"tokens": tokens}
        shown = ", ".join(f"{k} {runs[name][k]:.3f}" for k in ("accuracy", "length", "regret"))
        print(f"    {name}: {shown}", flush=True)
    return runs


def measure(config: Config, world: World, params: Any, seed: int) -> dict[str, Any]:
    """Accuracy, tokens, filler, regret and curves over tokens of samples for held-out questions."""
    key = jax.random.key(seed)
    with mesh_context(world.mesh):
        batch = world.sample(config.samples)(params, world.held_out, key)
        batch = world.add_chances(batch, params, key)
    ends, chances = batch["episode_ends"], batch["answer_chances"]
    budgets = np.linspace(0, world.limit, POINTS)[1:]
    spent, curves = ends + len(world.forced) + world.answer, []
    for x, y, there in zip(spent, chances, ends >= 0, strict=True):
        regrets = [rl.normalised_regret(x[there], y[there], c) for c in budgets]
        reached = np.interp(budgets, np.append(0, x[there]), np.append(0, y[there]))
        curves.append((regrets, reached))
    regrets, reached = np.mean(curves, axis=0)
    return {
        "accuracy": float(np.mean(batch["rewards"])),
        "length": float(batch["completion_mask"].sum(axis=1).mean()),
        "filler": world.filler(batch) if world.filler else float("nan"),
        "regret": float(regrets[-1]),
        "budgets": budgets.tolist(),
        "regrets": regrets.tolist(),
        "chances": reached.tolist(),
    }


def train_rl(
    config, world, seed, algorithm, *transforms, prompts=None, asked=None, sample=None
) -> tuple[Any, int]:
    """(params, tokens sampled and forced) of one algorithm; `prompts` questions per step."""
    prompts = prompts or config.prompts_per_step
    asked, sample = asked or world.known, sample or world.sample(config.group_size)
    per_step = min(prompts, len(asked.ids))
    drawn = rl.Prompts(asked.ids, per_step, asked.records, columns=asked.columns, seed=seed)
    batches = rl.collect(drawn, sample, algorithm.credit, *transforms, mesh=world.mesh)
    rows = per_step * config.group_size
    state, history = world.fit(
        algorithm.objective, batches, rows, steps=config.steps, key=jax.random.key(seed)
    )
    forced = len(world.forced) + world.answer - 1  # computed for each prefix
    extra = lambda row: (row["episodes"] + 1) * forced if "episodes" in row else 0
    return state.params, round(sum((row["length"] + extra(row)) * rows for row in history))


def build(world: World) -> rl.Algorithm:
    """Returns `policy_gradient` of the world's model."""
    return functools.partial(policy_gradient, world.model.forward)


def grpo(config: Config, world: World, seed: int, *transforms: Any) -> tuple[Any, int]:
    """Trains on the outcome."""
    credit = rl.grpo(build(world), config.group_size).credit
    algorithm = rl.Algorithm(credit, build(world)(clipped(), token_mean))
    return train_rl(config, world, seed, algorithm, *transforms)


def grpo_lenpen(config: Config, world: World, seed: int) -> tuple[Any, int]:
    """Trains on the outcome minus a penalty of the length."""
    return grpo(
        config, world, seed, rl.add_penalty(lambda n: -config.penalty * np.asarray(n) / world.limit)
    )


def mrt_online(config: Config, world: World, seed: int) -> tuple[Any, int]:
    """Trains on outcome and progress."""
    algorithm = rl.mrt_online(build(world), config.group_size, config.alpha)
    prompts = config.online_prompts
    return train_rl(config, world, seed, algorithm, world.add_chances, prompts=prompts)


def traces(world: World, seed: int, count: int) -> dict[str, Any]:
    """`count` answers of the start to each training question, with their prefixes and chances."""
    key = jax.random.key(seed + 1_000_000)
    with mesh_context(world.mesh):
        batch = world.sample(count)(world.start, world.known, key)
        return world.add_chances(batch, world.start, key)


def mrt_stale(config: Config, world: World, seed: int) -> tuple[Any, int]:
    """Trains from prefixes of the start's answers, of a uniform number of episodes."""
    batch, rng = traces(world, seed, 1), np.random.default_rng(seed)
    counts = np.minimum((batch["episode_ends"] >= 0).sum(axis=1), EPISODES + 1)
    rows = np.arange(len(counts))
    ids = prefixes_of(batch, rows, batch["episode_ends"][rows, rng.integers(counts)])
    sample = rl.with_terminations(world.sample_on(config.group_size // 2), world.forced)
    algorithm = rl.mrt_stale(build(world), config.group_size)
    params, tokens = train_rl(
        config, world, seed, algorithm, asked=world.known._replace(ids=ids), sample=sample
    )
    return params, tokens + int(batch["completion_mask"].sum())


def star(config: Config, world: World, seed: int) -> tuple[Any, int]:
    """Fine-tunes on right answers of the start, without what follows the most progress."""
    rows = config.prompts_per_step * config.group_size
    count = max(1, rows * config.steps // len(world.known.ids) // 2)
    batch = traces(world, seed, count)
    own = shorter(batch)
    weights = batch["rewards"] >= 1
    chosen = np.flatnonzero(weights) if weights.any() else np.arange(len(weights))
    rng = np.random.default_rng(seed)
    batches = (rows_of(own, rng.choice(chosen, rows)) for _ in range(config.steps))
    objective = build(world)(reinforce(), token_mean)
    state, _ = world.fit(objective, batches, rows, steps=config.steps, key=jax.random.key(seed))
    prefixes = int((batch["episode_ends"] >= 0).sum())
    forced = prefixes * (len(world.forced) + world.answer - 1)
    return state.params, int(batch["completion_mask"].sum()) + forced


def shorter(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns rows of `policy_gradient` with `shortened` answers and advantage 1."""
    size = batch["completion_mask"].shape[1]
    answers = batch["tokens"][:, -size:]
    kept = shortened(
        answers, batch["completion_mask"], batch["episode_ends"], batch["answer_chances"]
    )
    tokens, segments = batch["tokens"].copy(), batch["segment_ids"].copy()
    mask = np.arange(size) < np.array([len(ids) for ids in kept])[:, None]
    for row, ids in zip(tokens, kept, strict=True):
        row[-size:] = 0
        row[-size : len(row) - size + len(ids)] = ids
    segments[:, -size:] = mask
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    return {
        "tokens": tokens, "segment_ids": segments, "positions": positions, "completion_mask": mask,
        "sampler_log_probs": np.zeros(mask.shape, np.float32),
        "advantages": np.ones(len(mask), np.float32),
    }  # fmt: skip


METHOD = {f.__name__: f for f in (grpo, grpo_lenpen, mrt_online, mrt_stale, star)}


def judge(runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers; those of methods that were not run are left out."""
    of = lambda name, metric: np.array([run[name][metric] for run in runs])
    claims = []
    if "mrt_online" in runs[0]:
        lower = of("grpo", "regret") - of("mrt_online", "regret")
        shorter = 1 - of("mrt_online", "length") / of("grpo", "length")
        gain = of("mrt_online", "accuracy") - of("grpo", "accuracy")
        tokens = of("mrt_online", "tokens") / of("grpo", "tokens")
        claims += [
            Claim(
                "MRT's regret over tokens is more than 0.08 below GRPO's", "lower at 4k to 16k tokens",
                [mean(lower, "above", 0), mean(lower, "above", 0.08, by="estimate")],
                f"tokens of training, MRT over GRPO: {tokens.mean():.2f}",
            ),
            Claim(
                "its answers are more than 15 % shorter", "1.5 times fewer tokens",
                [mean(shorter, "above", 0), mean(shorter, "above", 0.15, by="estimate")],
            ),
            Claim(
                "its accuracy is not lower than GRPO's", "+2.2 against +1.1 points",
                [mean(gain, "at least", 0, by="estimate")],
            ),
        ]  # fmt: skip
        if "grpo_lenpen" in runs[0]:
            gain = of("mrt_online", "accuracy") - of("grpo_lenpen", "accuracy")
            claims += [
                Claim(
                    "MRT is more accurate than GRPO with a length penalty", "the penalty loses 3.7 points",
                    [mean(gain, "above", 0)],
                )
            ]  # fmt: skip
    if "mrt_stale" in runs[0]:
        lower = of("grpo", "regret") - of("mrt_stale", "regret")
        claims += [
            Claim(
                "MRT from stale prefixes has lower regret than GRPO", "better than the online form",
                [mean(lower, "above", 0)],
            )
        ]  # fmt: skip
    return claims


def print_table(runs: list[dict]) -> None:
    """Measures of each method: means over seeds."""
    columns = {"accuracy": ".3f", "length": ".1f", "filler": ".3f", "regret": ".3f", "tokens": ",.0f"}
    table = Table("method", *columns, "accuracy above GRPO's", "regret below GRPO's")
    for name in runs[0]:
        means = [f"{np.mean([run[name][c] for run in runs]):{f}}" for c, f in columns.items()]
        gap = lambda metric, name=name: [run[name][metric] - run["grpo"][metric] for run in runs]
        table.add_row(name, *means, show(gap("accuracy")), show([-x for x in gap("regret")]))
    Console(width=140).print(table)


def _figure(runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    titles = {
        "regrets": "regret up to a budget",
        "chances": "chance of a right result when cut there",
    }
    for axes, (metric, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name in runs[0]:
            values = [run[name][metric] for run in runs]
            plot_band(axes, runs[0][name]["budgets"], values, label=name)
        axes.set(xlabel="tokens of an answer", title=title)
    axes.legend(fontsize=7)
    figure.savefig(output / "mrt.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
