"""Worlds of MRT's script: items with values for a small model, or questions with answers in text.

`config` is the Config of experiments/papers/mrt/main.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.papers.mrt import texts
from experiments.worlds import arithmetic, lookups, questions
from jaxft import rl, train
from jaxft.models import Decoder
from jaxft.parallel import mesh_context

EPISODES = 6  # most episodes of a stale prefix
POINTS = 11  # of the curves over tokens


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
    answer: int  # tokens of a forced answer that count in the regret
    cost: int  # tokens that the chance at one prefix costs
    limit: int  # tokens of an answer
    fit: Callable[..., tuple]  # (objective, batches, rows per step, **more), from the start
    filler: Callable[[dict], float] | None = None  # fraction of episodes without use, if known
    mesh: Any = None


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: items for a small model or, with another preset, the source's questions."""
    if config.preset == "small":
        yield functools.partial(items, config)
        return
    if config.preset == "smollm2":
        with questions.opened(config.source, texts.in_lines, texts.grader) as task:
            yield functools.partial(sums, config, task)
        return
    with questions.opened(config.source) as task:
        yield lambda seed: problems(config, task)


def items(config: Any, seed: int) -> World:
    """Returns the world of items and their values, with a model pretrained for the seed."""
    counts = (config.pretraining, config.known, config.held_out)
    task = lookups.task(seed, *counts, width=config.width, layers=config.layers)
    start, steps = lookups.started(task, seed, config.until)
    print(f"seed {seed}: {steps} steps of pretraining", flush=True)
    forced = arithmetic.encode([lookups.FORCED])[0]
    optimizer = arithmetic.policy_optimizer(config.learning_rate)
    longest = lookups.WIDTH + lookups.SEGMENT * EPISODES + len(forced)
    return World(
        task.model, start, task.known, task.held_out,
        lookups.answers(task.model), lookups.answers(task.model, longest),
        rl.add_chances(lookups.ends_of, rl.exact_chances(task.model, forced)), forced,
        2, len(forced) + 1, lookups.LIMIT,
        lambda objective, batches, rows, **more: train.fit(start, objective, optimizer, batches, **more),
        lookups.filler,
    )  # fmt: skip


def problems(config: Any, task: questions.Task) -> World:
    """Returns the world of the task's questions; chances are estimated from samples."""
    plain, decode = questions.sampler(task), task.renderer.tokenizer.decode
    # The columns are for `judge`; a decoder reads none, and `plain` does not split them.
    sampler = lambda *args, columns=None, **more: plain(*args, **more)
    known, held_out = len(task.known.ids), len(task.held_out.ids)
    records = [*task.known.records, *task.held_out.records]

    def judge(completions, rows, batch):
        given = [decode(ids, skip_special_tokens=True).strip() for ids in completions]
        return task.rewards(given, [records[n] for n in np.asarray(batch["number"])[rows]])

    forced = texts.forced(task, texts.THOUGHTS)
    short = dataclasses.replace(task.sampling, max_new_tokens=config.answer_tokens)
    chances = rl.sampled_chances(task.model, judge, forced, short, config.branches, sampler=sampler)
    return _in_text(
        config, task, texts.THOUGHTS, chances, sampler,
        {"number": np.arange(known)}, {"number": known + np.arange(held_out)},
        cost=config.branches * (len(forced) + config.answer_tokens),
    )  # fmt: skip


def sums(config: Any, task: questions.Task, seed: int) -> World:
    """Returns the world of sums for SmolLM2 with LoRA; chances are those of the only right tokens."""
    task, plain = (
        texts.tuned(task, config.rank, config.pretrain_steps, seed),
        questions.sampler(task),
    )
    sampler = lambda *args, columns=None, **more: plain(*args, **more)
    forced = texts.forced(task, texts.LINES)
    golds = [{"gold": texts.golds(task, part.records)} for part in (task.known, task.held_out)]
    world = _in_text(
        config, task, texts.LINES, rl.exact_chances(task.model, forced), sampler, *golds,
        cost=len(forced) + golds[0]["gold"].shape[1],
    )  # fmt: skip
    filler = functools.partial(texts.filler, task.renderer.tokenizer.decode)
    return world._replace(filler=filler)


def _in_text(config, task, reasoning, chances, sampler, known, held_out, *, cost):
    """The world of a task with answers in text, whose questions get the columns `known`, `held_out`."""
    tokenizer, limit = task.renderer.tokenizer, config.source.max_new_tokens
    sample = lambda group_size: rl.answers(
        task.model, tokenizer, task.rewards, task.sampling, group_size, sampler=sampler
    )
    ends = functools.partial(
        rl.text_ends, decode=tokenizer.decode, most=reasoning.most, split=reasoning.split,
        close=reasoning.close,
    )  # fmt: skip
    fit = lambda objective, batches, rows, **more: questions.fit(
        task, task.params, objective, config.learning_rate, batches, rows, **more
    )
    return World(
        task.model, task.params, task.known._replace(columns=known),
        task.held_out._replace(columns=held_out), sample, sample, rl.add_chances(ends, chances),
        texts.forced(task, reasoning), 1, cost, limit, fit, mesh=task.mesh,
    )  # fmt: skip


def measure(config: Any, world: World, params: Any, seed: int) -> dict[str, Any]:
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
        "accuracy": float(np.mean(batch["rewards"] >= 1)),
        "length": float(batch["completion_mask"].sum(axis=1).mean()),
        "filler": world.filler(batch) if world.filler else float("nan"),
        "regret": float(regrets[-1]),
        "budgets": budgets.tolist(),
        "regrets": regrets.tolist(),
        "chances": reached.tolist(),
    }
