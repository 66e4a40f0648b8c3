"""Training of the survey's script: an outcome and a process reward model, and the policy itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from experiments.papers.reasoning_survey.worlds import World, padded
from experiments.worlds import arithmetic
from jaxft import rl
from jaxft.generation import Verifier, rollout_verifier, run_searches, sample_chains
from jaxft.keys import stream
from jaxft.objectives import policy_gradient, supervised

Chain = tuple[int, tuple[int, ...]]  # number of a known prompt, answer


def sampled(config: Any, world: World, seed: int) -> tuple[list[list[tuple]], list[list[bool]]]:
    """(`config.own` answers of the start to each known prompt, whether each is right)."""
    searches = [sample_chains(prompt, config.own) for prompt in world.known]
    key = stream(jax.random.key(seed), "own chains")
    found = run_searches(searches, world.chains(world.start), key)
    answers = [[path.answer for path in paths] for paths, _ in found]
    numbers = np.repeat(np.arange(len(answers)), config.own).tolist()
    right = world.right_known(numbers, [ids for some in answers for ids in some])
    return answers, np.asarray(right).reshape(-1, config.own).tolist()


def verifiers(
    config: Any, world: World, answers: list[list[tuple]], right: list[list[bool]], seed: int
) -> tuple[Verifier, Verifier | None]:
    """(outcome, process) reward models of the start's own answers, equal ones once.

    The outcome model learns at the end of an answer whether it is right, the process model at the end of
    each step the fraction of rollouts that end right; None without rollouts.
    """
    labels = {
        (number, ids): good
        for number, (some, verdicts) in enumerate(zip(answers, right, strict=True))
        for ids, good in zip(some, verdicts, strict=True)
    }
    chains = list(labels)
    fit = functools.partial(trained, world, chains, seed=seed)
    if not config.rollouts:
        last = [world.ends(ids)[-1:] for _, ids in chains]
        return fit(last, [[float(good)] for good in labels.values()]), None
    values = step_values(config, world, chains, seed) | {
        (number, world.known[number] + ids): float(good) for (number, ids), good in labels.items()
    }
    ends = [world.ends(ids) for _, ids in chains]
    inside = lambda chain, end: values[chain[0], world.known[chain[0]] + chain[1][:end]]
    of_steps = [[inside(c, end) for end in some] for c, some in zip(chains, ends, strict=True)]
    last = [[some[-1]] for some in ends]
    of_ends = [[some[-1]] for some in of_steps]
    return fit(last, of_ends), fit(ends, of_steps)


def step_values(
    config: Any, world: World, chains: list[Chain], seed: int
) -> dict[tuple[int, tuple], float]:
    """{(number, prompt and first steps): fraction of right rollouts}, without whole answers."""
    keys = {
        world.known[number] + ids[:end]: number
        for number, ids in chains
        for end in world.ends(ids)[:-1]
    }

    def right(paths):
        numbers = [keys[path.prompt] for path in paths]
        whole = [path.tokens[len(world.known[i]) :] for i, path in zip(numbers, paths, strict=True)]
        return world.right_known(numbers, whole)

    key = stream(jax.random.key(seed), "rollouts")
    values = rollout_verifier(world.chains(world.start), key, config.rollouts, right)
    return {
        (number, prefix): value
        for (prefix, number), value in zip(keys.items(), values(list(keys)), strict=True)
    }


def trained(
    world: World,
    chains: list[Chain],
    ends: list[list[int]],
    labels: list[list[float]],
    seed: int,
) -> Verifier:
    """Returns the verifier that learns labels at the ends of steps of chains."""
    rows = padded([(world.known[number], ids) for number, ids in chains])
    rows = {name: x[:, None] for name, x in rows.items()}
    # As many places for either verifier: one program is compiled.
    most = max(world.depth, *map(len, ends))
    places = np.full((len(ends), most), -1, np.int32)
    values = np.zeros(places.shape, np.float32)
    for i, (some, given) in enumerate(zip(ends, labels, strict=True)):
        places[i, : len(some)] = len(world.known[chains[i][0]]) + np.array(some) - 1
        values[i, : len(some)] = given
    return world.reward_model(rows | {"step_ends": places, "step_labels": values}, seed)


def rft(config: Any, world: World, answers: list, right: list, seed: int) -> Any:
    """Params of rejection sampling: the start, fine-tuned on its own right answers, each once."""
    kept = rl.offline_collect(answers, right)
    if not kept:
        return world.start
    rows = padded([(world.known[number], ids) for number, ids in kept])
    size, objective = config.batch_size, supervised(world.model.forward)
    batches = arithmetic.epochs(rows, seed, size)
    return world.fit(world.start, objective, config.learning_rate, batches, size, config.rft_steps)


def grpo(config: Any, world: World, seed: int) -> Any:
    """Params of GRPO from the start, in groups of 8 with the outcome as reward."""
    build = functools.partial(policy_gradient, world.model.forward)
    return world.reinforce(rl.grpo(build, 8), config.rl_steps, seed)
