"""The methods of the survey that spend compute on an answer, and their measurement.

Methods that choose among independent chains see the same chains: the first n of those of each question.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.papers.reasoning_survey.worlds import AGENTS, World
from jaxft import generation
from jaxft.generation import Cost, Judge, Path, Policy, Step, Verifier, flops, run_searches
from jaxft.keys import stream
from jaxft.metrics import majority_vote, pass_at_k, rerank, weighted_vote

Choose = Callable[[list[Path]], Path | None]
WIDTH = 4  # steps that tree searches try after a path


class Run(NamedTuple):
    """One method at one size, on all held-out questions."""

    searches: list[generation.Search]
    policy: Policy
    choose: Choose
    verifier: Verifier | None = None


def curves(
    config: Any, world: World, outcome: Verifier, process: Verifier | None, seed: int
) -> dict[str, list[dict[str, float]]]:
    """{method: [{n, accuracy, flops a question} at each size]} of the start.

    Without a process model, only choices among whole chains.
    """
    runs, oracle = chain_runs(config, world, world.start, outcome, process, seed)
    if process is not None:
        runs |= search_runs(config, world, outcome, process, seed)
    found: dict[str, list] = {}
    for (name, n), run in runs.items():
        row = measured(world, run, seed, n)
        found.setdefault(name, []).append({"n": n} | row)
    votes = {row["n"]: row["flops"] for row in found["majority"]}
    found["oracle"] = [
        {"n": n, "accuracy": accuracy, "flops": votes[n]} for n, accuracy in oracle.items()
    ]
    return found


def measured(world: World, run: Run, seed: int, n: int) -> dict[str, float]:
    """{accuracy, FLOPs and generated tokens a question, sequential passes} of a run."""
    key = stream(jax.random.key(seed), "method", n)
    results = run_searches(run.searches, run.policy, key, run.verifier)
    chosen = [run.choose(paths) for paths, _ in results]
    known = [i for i, path in enumerate(chosen) if path is not None]
    right = world.right(known, [chosen[i].answer for i in known])
    price = world.cost if run.verifier else Cost(0)
    budgets = [budget for _, budget in results]
    mean = lambda values: float(np.mean(list(values)))
    return {
        "accuracy": float(np.sum(right) / len(chosen)),
        "flops": mean(flops(budget, world.cost, price) for budget in budgets),
        "generated": mean(budget.generated for budget in budgets),
        "passes": mean(budget.passes for budget in budgets),
    }


def chain_runs(
    config: Any, world: World, params: Any, outcome: Verifier, process: Verifier | None, seed: int
) -> tuple[dict[tuple[str, int], Run], dict[int, float]]:
    """({(method, n): run} of choices among chains, {n: pass@n})."""
    prompts = world.held_out
    greedy = [generation.sample_chains(prompt, 1) for prompt in prompts]
    runs = {("greedy", 1): Run(greedy, world.chains(params, 0.0), first)}
    sampled = drawn(config, world, params, seed)
    rng = np.random.default_rng(seed)
    by_outcome, by_step = remembered(outcome), process and remembered(process)
    random = remembered(lambda asked: rng.random(len(asked)).tolist())
    replay = recorded(prompts, sampled)
    vote = voted(world, lambda paths, answers: majority_vote(answers))
    best = voted(world, lambda paths, answers: rerank(last(paths), answers))
    lowest = voted(world, lambda paths, answers: rerank([min(p.values) for p in paths], answers))
    weighted = voted(world, lambda paths, answers: weighted_vote(last(paths), answers))
    for n in sizes(config):
        plain = lambda n=n: [generation.sample_chains(prompt, n) for prompt in prompts]
        judged = lambda n=n: [generation.judged_chains(prompt, n) for prompt in prompts]
        runs |= {
            ("majority", n): Run(plain(), replay, vote),
            ("best of N", n): Run(judged(), replay, best, by_outcome),
            ("weighted vote", n): Run(judged(), replay, weighted, by_outcome),
            ("best of N, random verifier", n): Run(judged(), replay, best, random),
        }
        if by_step:
            by_steps = [judged_steps(world, prompt, n) for prompt in prompts]
            runs["best of N, process, min", n] = Run(by_steps, replay, lowest, by_step)
    numbers = np.repeat(np.arange(len(prompts)), config.most).tolist()
    right = world.right(numbers, [path.answer for paths in sampled for path in paths])
    counts = np.reshape(right, (len(prompts), config.most)).sum(axis=1)
    oracle = {n: float(pass_at_k(counts, config.most, n).mean()) for n in sizes(config)}
    return runs, oracle


def search_runs(
    config: Any, world: World, outcome: Verifier, process: Verifier, seed: int
) -> dict[tuple[str, int], Run]:
    """{(method, n): run} of searches that sample on their own; n chains' worth of samples at most."""
    chains, steps = world.chains(world.start), world.steps(world.start)
    vote = voted(world, lambda paths, answers: majority_vote(answers))
    best = voted(world, lambda paths, answers: rerank(last(paths), answers))
    weighted = voted(world, lambda paths, answers: weighted_vote(last(paths), answers))
    read = lambda path: world.read(path.answer)
    prompts, depth, runs = list(enumerate(world.held_out)), world.depth, {}
    for n in (size for size in config.sizes if size > 1):
        beams = -(-n // WIDTH) * WIDTH
        tree = lambda make, n=beams: [make(p, n, WIDTH, depth) for _, p in prompts]
        runs |= {
            ("step beam search", n): Run(tree(generation.step_beam_search), steps, best, process),
            ("DVTS", n): Run(tree(generation.diverse_tree_search), steps, weighted, process),
            ("MCTS", n): Run(
                [generation.mcts(p, n, WIDTH, depth) for _, p in prompts], steps, weighted, process
            ),
            ("adaptive consistency", n): Run(
                [generation.adaptive_consistency(p, n, read, block=4) for _, p in prompts], chains, vote
            ),
            ("self-refine", n): Run(
                [refined(world, i, p, max(1, n // 5)) for i, p in prompts], chains, first
            ),
            ("generator and evaluator", n): Run(
                [generation.generator_evaluator(p, n, 0.9, lambda path: path.prompt) for _, p in prompts],
                chains, best, outcome,
            ),
            ("debate", n): Run(
                [debated(world, i, p, max(2, n // AGENTS)) for i, p in prompts], chains, vote
            ),
        }  # fmt: skip
    return runs


def refined(world: World, number: int, prompt: tuple, rounds: int) -> generation.Search:
    """Self-refinement of a model that knows no critique: its feedback is a second attempt.

    The second attempt is made in view of the first; if both have one answer, it is accepted.
    """
    return generation.self_refine(
        prompt, rounds,
        critique=lambda path: world.again(number, [path.answer]),
        revise=lambda path, other: world.again(number, [path.answer, other.answer]),
        accepts=lambda path, other: world.read(path.answer) == world.read(other.answer),
    )  # fmt: skip


def debated(world: World, number: int, prompt: tuple, rounds: int) -> generation.Search:
    """Debate of AGENTS agents, each of which sees the others' last answers."""

    def context(paths, own):
        return world.again(number, [path.answer for i, path in enumerate(paths) if i != own])

    return generation.debate(prompt, AGENTS, rounds, context)


def judged_steps(world: World, prompt: tuple, n: int) -> generation.Search:
    """Samples n chains and judges each at the end of every step."""
    paths = yield from generation.sample_chains(prompt, n)
    parts = [prefixes(world, path) for path in paths]
    values = iter((yield Judge([tokens for some in parts for tokens in some])))
    return [
        path._replace(values=tuple(next(values) for _ in some))
        for path, some in zip(paths, parts, strict=True)
    ]


def sizes(config: Any) -> list[int]:
    """Numbers of chains: powers of two up to `config.most`."""
    return [2**i for i in range(config.most.bit_length())]


def drawn(config: Any, world: World, params: Any, seed: int) -> list[list[Path]]:
    """`config.most` chains of each held-out question."""
    searches = [generation.sample_chains(prompt, config.most) for prompt in world.held_out]
    key = stream(jax.random.key(seed), "held-out chains")
    return [paths for paths, _ in run_searches(searches, world.chains(params), key)]


def learned(config: Any, world: World, params: Any, outcome: Verifier, seed: int) -> dict[str, Any]:
    """`summary` of other params; the verifier is that of the start."""
    runs, oracle = chain_runs(config, world, params, outcome, None, seed)
    names = ("greedy", "majority", "best of N")
    found: dict[str, list] = {name: [] for name in names}
    for (name, n), run in runs.items():
        if name in names:
            found[name].append(measured(world, run, seed, n))
    return summary(found | {"oracle": [{"accuracy": value} for value in oracle.values()]})


def summary(curves: dict[str, list[dict]]) -> dict[str, Any]:
    """Accuracies of params: greedy, and pass@n, votes and best of n at each n."""
    of = lambda name: [row["accuracy"] for row in curves[name]]
    return {
        "greedy": of("greedy")[0],
        "pass": of("oracle"),
        "vote": of("majority"),
        "best": of("best of N"),
    }


def prefixes(world: World, path: Path) -> list[tuple]:
    """The tokens up to the end of each step of a chain."""
    return [path.prompt + path.answer[:end] for end in world.ends(path.answer)]


def recorded(prompts: Sequence[tuple], sampled: Sequence[list[Path]]) -> Policy:
    """A policy that repeats the first chains that were sampled for each prompt."""
    steps = {
        prompt: [Step(path.answer, path.log_prob, path.ended) for path in paths]
        for prompt, paths in zip(prompts, sampled, strict=True)
    }
    return lambda key, asked, samples: [steps[prompt][:samples] for prompt in asked]


def remembered(verifier: Verifier) -> Verifier:
    """A verifier that judges each prefix once, however often it is asked."""
    values: dict[tuple, float] = {}

    def judge(asked):
        new = [prefix for prefix in dict.fromkeys(asked) if prefix not in values]
        if new:
            values.update(zip(new, verifier(new), strict=True))
        return [values[prefix] for prefix in asked]

    return judge


def first(paths: list[Path]) -> Path:
    """The only path."""
    return paths[0]


def last(paths: list[Path]) -> list[float]:
    """The verifier's last value of each path."""
    return [path.values[-1] for path in paths]


def voted(world: World, vote: Callable[[list[Path], list], Any]) -> Choose:
    """Returns the choice of the first path that has the answer of a vote; None if none has an answer.

    In a tie the answer whose path has the highest log-probability per token wins.
    """

    def choose(paths):
        paths = sorted(paths, key=lambda path: -path.mean_log_prob)
        answers = [world.read(path.answer) for path in paths]
        wanted = vote(paths, answers)
        return None if wanted is None else paths[answers.index(wanted)]

    return choose


def quality(world: World, outcome: Verifier, seed: int) -> dict[str, float]:
    """Squared error of the outcome model's values on held-out chains, and that of the mean."""
    searches = [generation.sample_chains(prompt, 1) for prompt in world.held_out]
    key = stream(jax.random.key(seed), "quality")
    found = run_searches(searches, world.chains(world.start), key)
    sampled = [path for (path,), _ in found]
    right = world.right(list(range(len(sampled))), [path.answer for path in sampled])
    values, right = np.array(outcome([path.tokens for path in sampled])), np.array(right, float)
    return {
        "brier": float(np.mean((values - right) ** 2)),
        "brier of the mean": statistics.pvariance(right.tolist()),
    }
