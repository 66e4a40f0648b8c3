"""NFT: Bridging Supervised Learning and Reinforcement Learning in Math Reasoning (arXiv 2505.18116).

Negative-aware fine-tuning maximises the likelihood of right answers under the policy, and of wrong
ones under the policy that it implies for them. On-policy its gradient is GRPO's, or Dr. GRPO's, by
the weight of a prompt; off-policy the one decays where the other is clipped.

    python experiments/papers/nft.py
    python experiments/papers/nft.py --ablations     also prompt weights, floors, weights of wrong answers
    python experiments/papers/nft.py --preset full   Qwen2.5-Math-7B on DAPO-Math-17k, 8 GPUs of 80 GB
    python experiments/papers/nft.py --preset full --model Qwen/Qwen2.5-1.5B --data questions.jsonl

The task is the addition of two two-digit numbers (reasoning-gym's chain_sum). A model of 0.2 M
parameters is pretrained until it samples the right answer with probability 0.45. All methods start
from the same params of a seed and see the same questions in the same order, with 64 x 8 answers a
rollout and four updates on each rollout. pass@1 is the exact probability of the right answer to
held-out questions. Settings were chosen on seeds of 100 and above.

Two statements of the paper are not judged: that NFT ends above rejection sampling (RFT), and that
its entropy rises where RFT's falls. Only one string answers a question here, so entropy falls as
accuracy rises for every method, and RFT's answers have no weights, which makes its steps larger.
The recorded run (docs/results.md), seeds 0 to 2, from pass@1 0.439: NFT reaches 0.554, GRPO 0.568 and
RFT 0.569, all with an entropy of 0.26 to 0.27 nats per token. Three seeds do not show NFT's gain,
+0.115 [-0.003, 0.234], nor that training only on wrong answers helps, +0.019 [-0.051, 0.089]. (Earlier
runs measured 0.545 and 0.561 for NFT, and +0.012 [-0.007, 0.031] and +0.027 [-0.044, 0.098] for only
wrong answers.)

Ablations of an earlier run on the same seeds, as differences from NFT's 0.561: GRPO's weight of a
prompt makes no difference (0.000 [-0.026, 0.026]), nor does half the weight of wrong answers (+0.003
[-0.031, 0.037]). Without weights of prompts NFT ends lower (-0.044 [-0.089, 0.000]; -0.053 [-0.072,
-0.034] against GRPO), as in the paper. With 16 updates per rollout, no floor ε ends above the start (ε
= 1: -0.014 [-0.229, 0.201]), so these runs say little about floors: ε = 0.05 ends where ε = 1 does
(-0.008 [-0.145, 0.128]), although its gradients have nine times the norm (13.1 against 1.5) before they
are clipped to 1.

Departures from the paper: the losses are means over tokens, where the authors divide by 1000 and
clip. At the default size, rollouts are not filled up with prompts whose answers differ; prompts
with all answers right or all wrong have weight 0, also for DAPO.

`--preset full` has the paper's model, rollouts (512 x 16 answers, up to 10 draws for groups with
right and wrong answers, 16 updates) and optimizer (AdamW, rate 1e-6 after 10 warm-up steps, decay
0.1). It measures pass@1 and pass@8 from eight answers at temperature 0.6 and top-p 0.7 to 200
held-out questions of the training data, or to those of --eval-data; the paper has six benchmarks,
most with 32 answers. It does not measure the identity of the gradients, which bfloat16 hides. The
paper has one run; a claim needs the default of several seeds.
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
from experiments.lab.claims import Claim, mean, show, worst
from experiments.lab.figures import plot_band
from experiments.lab.seeds import begin, measure_claims
from experiments.worlds import arithmetic, questions
from jaxft import rl, train
from jaxft.metrics import pass_at_k
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_mean
from jaxft.optim.perturbations import global_norm
from jaxft.rl.advantages import centred_advantages, success_rates
from jaxft.rl.token_losses import clipped, negative_aware

METHODS = ("NFT", "GRPO", "Dr. GRPO", "DAPO", "RFT", "only wrong answers")
ABLATIONS = ("NFT, GRPO's weight", "NFT, weight 1", "NFT, λ = 0.5")
FLOORS = (1.0, 0.5, 0.05)  # ε, with 16 updates per rollout, where R is far from 1
ONE = lambda rate: jnp.ones_like(rate)
GRPO_WEIGHT = lambda rate: jnp.sqrt((1 - rate) / rate)
SAMPLES = 8  # answers to each held-out question, with --preset full
DAPO_MATH = questions.Settings(
    model="Qwen/Qwen2.5-Math-7B",
    data="open-r1/DAPO-Math-17k-Processed?name=en",
    max_new_tokens=3584,
)
FULL = dict(
    rollouts=320, prompts_per_step=512, group_size=16, updates=16, learning_rate=1e-6,
    fields={"question": "prompt", "answer": "solution"},
)  # fmt: skip
SMOKE = dict(seeds=1, until=0.002, rollouts=1, prompts_per_step=4, group_size=4, updates=2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    # probability of a correct training answer at which the start ends
    until: float = 0.45
    rollouts: int = 60  # rollouts of each method
    prompts_per_step: int = 64  # questions per rollout
    group_size: int = 8  # answers to each question
    updates: int = 4  # optimizer steps on parts of a rollout
    learning_rate: float = 3e-4  # learning rate of all methods
    ablations: bool = False  # also weights of questions, floors and weights of wrong answers
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/nft"
    preset: Literal["small", "full"] = "small"  # full: the paper's model, questions and sizes
    source: questions.Settings = DAPO_MATH
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    config = questions.sized(config, FULL, SMOKE, only_small=("until",))
    with opened(config) as world:
        run = functools.partial(run_seed, config, world)
        return measure_claims(
            this, config, run, judge=judge, print_table=print_table, figure=_figure
        )


class World(NamedTuple):
    """A model with its questions, and how answers to held-out ones are measured."""

    model: Decoder
    start: Any  # params from which all methods start
    reinforce: Callable[
        ..., tuple[Any, list[dict]]
    ]  # `arithmetic.reinforce` of the model and start
    measure: Callable[[Any], dict[str, float]]  # params -> {"pass@1", "pass@8"}
    sums: arithmetic.Sums | None  # None: other questions


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: sums by a small model, or with --preset full the source's questions."""
    if config.preset != "full":
        yield functools.partial(sums, config)
        return
    with questions.opened(config.source) as task:

        def measure(params, seed):
            decoding = dict(temperature=0.6, top_p=0.7)
            _, right = questions.graded(task, params, task.held_out, SAMPLES, seed, **decoding)
            rates = {k: pass_at_k(right.sum(axis=1), SAMPLES, k) for k in (1, 8)}
            return {f"pass@{k}": float(rate.mean()) for k, rate in rates.items()}

        reinforce = functools.partial(questions.reinforce, task, weight_decay=0.1)
        world = functools.partial(World, task.model, task.params, reinforce)
        yield lambda seed: world(functools.partial(measure, seed=seed), None)


def sums(config: Config, seed: int) -> World:
    """Returns the world of a seed's sums, whose pass@k are exact."""
    sizes = dict(width=32, size=400, layers=1) if config.smoke else {}
    task = arithmetic.task(seed, **sizes)
    start, _ = arithmetic.started(task, seed, config.until)

    def measure(params):
        p = np.asarray(task.probabilities(params, task.held_out_rows))
        return {f"pass@{k}": arithmetic.pass_at(p, k) for k in (1, 8)}

    reinforce = functools.partial(arithmetic.reinforce, task.model, start, task.sums)
    return World(task.model, start, reinforce, measure, task.sums)


def run_seed(config: Config, world: Callable[[int], World], seed: int) -> dict[str, Any]:
    """{"start": pass@1, "methods": {name: row}} of one start, and "identity" {...} for sums."""
    world = world(seed)
    build = functools.partial(policy_gradient, world.model.forward)
    methods = algorithms(build, config.group_size)
    names = METHODS[:2] if config.smoke else METHODS
    run = {"start": world.measure(world.start)["pass@1"]}
    if world.sums:
        run["identity"] = identity(config, world, build, seed)
    todo = [(name, methods[name], config.updates) for name in names]
    if config.ablations:
        todo += [(name, methods[name], config.updates) for name in ABLATIONS]
        credit = methods["NFT"].credit
        floor = lambda f: rl.Algorithm(credit, build(negative_aware(floor=f), token_mean))
        todo += [(f"NFT, ε = {f}, 16 updates", floor(f), 16) for f in FLOORS]
    run["methods"] = {
        name: train_method(config, world, algorithm, updates, seed)
        for name, algorithm, updates in todo
    }
    return run


def algorithms(build: Callable[..., Any], group_size: int) -> dict[str, rl.Algorithm]:
    """Returns the algorithms by the names of METHODS and ABLATIONS."""
    nft = functools.partial(rl.nft, build, group_size)
    wrong = nft()
    only_wrong = lambda rewards, batch: _without(wrong.credit(rewards, batch))
    return {
        "NFT": wrong,
        "GRPO": rl.Algorithm(rl.grpo(build, group_size).credit, build(clipped(), token_mean)),
        "Dr. GRPO": rl.Algorithm(
            rl.dr_grpo(build, group_size, 1).credit, build(clipped(), token_mean)
        ),
        "DAPO": rl.dapo(build, group_size),
        "RFT": nft(ONE, 0.0),
        "only wrong answers": rl.Algorithm(only_wrong, wrong.objective),
        "NFT, GRPO's weight": nft(GRPO_WEIGHT),
        "NFT, weight 1": nft(ONE),
        "NFT, λ = 0.5": nft(negative_weight=0.5),
    }


def _without(given):
    """The credit of a batch whose right answers count as answers to a prompt without any contrast."""
    return given | {"success_rates": jnp.where(given["correct"], 0.0, given["success_rates"])}


def train_method(config, world, algorithm, updates, seed) -> dict[str, Any]:
    """{"pass@1", "pass@8", "entropy", "grad_norm", "curve"} of one method."""
    every = max(1, config.rollouts // 12) * updates
    params, history = world.reinforce(
        algorithm,
        steps=config.rollouts * updates,
        seed=seed,
        learning_rate=config.learning_rate,
        prompts_per_step=config.prompts_per_step,
        group_size=config.group_size,
        updates=updates,
        callbacks=[train.every(every, lambda state: world.measure(state.params))],
    )
    last = history[-5 * updates :]
    return world.measure(params) | {
        "entropy": float(np.mean([row["entropy"] for row in last])),
        "grad_norm": float(np.mean([row["grad_norm"] for row in last])),
        "curve": [(row["step"] // updates, row["pass@1"]) for row in history if "pass@1" in row],
    }


def identity(config, world, build, seed) -> dict[str, float]:
    """‖∇NFT - ∇policy gradient‖ / ‖∇policy gradient‖ on a rollout of the policy itself, by the weight.

    Both at π = π_old, the ratio 1, with verdicts drawn at random.
    """
    size, params = config.group_size, world.start
    collect = arithmetic.experience(
        world.model, world.sums, lambda rewards, batch: {}, config.prompts_per_step, seed,
        group_size=size,
    )  # fmt: skip
    batch = dict(collect(params, collect.carry, jax.random.key(seed))[0])
    # Any verdicts will do; of random ones few groups have all alike.
    rewards = jax.random.bernoulli(jax.random.key(seed), 0.5, (len(batch["tokens"]),)) * 1.0
    rates = success_rates(rewards, size)
    batch |= {"correct": rewards >= 1.0, "success_rates": rates}
    centred = centred_advantages(rewards, size)
    deviation = jnp.sqrt(rates * (1 - rates))  # of zeros and ones, the biased one
    pairs = {
        "1 - r: Dr. GRPO": (lambda rate: 1 - rate, centred),
        "sqrt((1 - r) / r): GRPO": (GRPO_WEIGHT, centred / jnp.maximum(deviation, 1e-6)),
    }

    def gradient(loss, more):
        grads = jax.grad(lambda p: build(loss, token_mean)(p, batch | more, None)[0])
        return jax.jit(grads)(params)

    def distance(weight, advantages):
        ours = gradient(negative_aware(weight), {})
        theirs = gradient(clipped(), {"advantages": advantages})
        gap = jax.tree.map(lambda a, b: a - b, ours, theirs)
        return float(global_norm(gap) / global_norm(theirs))

    return {name: distance(*pair) for name, pair in pairs.items()}


def judge(runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    of = lambda name, metric="pass@1": np.array([run["methods"][name][metric] for run in runs])
    start = np.array([run["start"] for run in runs])
    exact = [_identity_claim(runs)] if "identity" in runs[0] else []
    if "only wrong answers" not in runs[0]["methods"]:  # the smallest size
        return exact
    gap = of("NFT") - of("GRPO")
    entropy = of("NFT", "entropy") - of("GRPO", "entropy")
    wrong = of("only wrong answers") - start
    return [
        *exact,
        Claim("NFT raises held-out pass@1", "31.6 -> 51.7", [mean(of("NFT") - start, "above", 0)]),
        Claim(
            "NFT ends within 4 points of GRPO on average", "51.7 and 49.5",
            [mean(gap, "within", (-0.04, 0.04), by="estimate")],
        ),
        Claim(
            "and within 0.05 nats per token of its entropy", "alike",
            [mean(entropy, "within", (-0.05, 0.05), by="estimate")],
        ),
        Claim(
            "only wrong answers raise pass@1 above the start", "they carry signal",
            [mean(wrong, "above", 0)],
        ),
    ]  # fmt: skip


def _identity_claim(runs):
    identity = {name: [run["identity"][name] for run in runs] for name in runs[0]["identity"]}
    return Claim(
        "on-policy NFT's gradient is the policy gradient's",
        "equal",
        [worst(x, "below", 1e-4, label=name, style=".0e") for name, x in identity.items()],
    )


def print_table(runs: list[dict]) -> None:
    """Each method's pass@1, pass@8, entropy and gradient norm: means over seeds, and pass@1 against GRPO."""
    table = Table("method", "pass@1", "pass@8", "entropy", "gradient norm", "pass@1 above GRPO's")
    table.add_row("start", f"{np.mean([run['start'] for run in runs]):.3f}")
    for name in runs[0]["methods"]:
        rows = [run["methods"][name] for run in runs]
        above = [run["methods"][name]["pass@1"] - run["methods"]["GRPO"]["pass@1"] for run in runs]
        mean = lambda metric, rows=rows: f"{np.mean([row[metric] for row in rows]):.3f}"
        table.add_row(name, *map(mean, ("pass@1", "pass@8", "entropy", "grad_norm")), show(above))
    Console(width=140).print(table)


def _figure(runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in runs[0]["methods"]:
        curves = [[(0, run["start"]), *run["methods"][name]["curve"]] for run in runs]
        steps, values = np.moveaxis(np.array(curves), -1, 0)
        plot_band(axes, steps[0], values, label=name)
    axes.set(xlabel="rollout", title="pass@1 on held-out questions, mean over seeds, 95 % interval")
    axes.legend(fontsize=7)
    figure.savefig(output / "nft.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
