"""Worlds of the script: pictures and a small model, or questions of a source and a model from disk.

`config` is the Config of experiments/papers/rft_multimodal/main.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.papers.rft_multimodal.methods import NOISE, NOISY, PART, RANDOM, TRAINED, Method
from experiments.worlds import arithmetic, documents, loaded, pictures, questions
from jaxft import rewards as rewarding
from jaxft import rl, train
from jaxft.keys import stream
from jaxft.objectives import policy_gradient, supervised, with_value_head, without_value_head
from jaxft.rl.rollouts import checked, interleaved, model_inputs

REWARDS = {
    "box": rewarding.iou_reward,
    "point": rewarding.point_reward,
    "count": rewarding.count_reward,
    "read": rewarding.edit_distance_reward,
    "choice": rewarding.choice_reward,
}


class World(NamedTuple):
    """A start, how it trains, and how answers to held-out questions are measured."""

    start: Any  # params
    # (method, "" or a control) -> (params, history)
    reinforce: Callable[[Method, str], tuple[Any, list[dict]]]
    supervise: Callable[[bool], Any]  # whether with TRAINED only -> params
    # (params, "own", "other" or "blank" pictures) -> "accuracy", "skills", "reward", "kl"
    measure: Callable[[Any, str], dict[str, Any]]
    prior: dict[str, float]  # accuracy in each skill without a picture
    extra: tuple[str, ...]


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: pictures by a small model, or with --preset full the source's questions."""
    if config.preset != "full":
        yield functools.partial(of_pictures, config)
        return
    with questions.opened(config.source) as task:
        if config.reward != "answer":
            records = [*task.known.records, *task.held_out.records]
            task = task._replace(rewards=REWARDS[config.reward](records))
        yield functools.partial(of_source, config, task)


def of_pictures(config: Any, seed: int) -> World:
    """Returns the world of pictures, with a model begun for the seed."""
    known, new = pictures.split(seed, config.known, config.held_out)
    part = [i for i, record in enumerate(known.records) if record["kind"] in TRAINED]
    some = pictures.Pictures([known.records[i] for i in part], known.images[part])
    model, params = pictures.small_model(jax.random.key(seed))
    rows = config.prompts_per_step * config.group_size // 2

    def supervise(params, own, steps, optimizer, seed):
        batches = itertools.islice(_batches(pictures.rows_of(own), seed, rows), steps)
        return train.fit(params, supervised(model.forward), optimizer, batches)[0].params

    begun = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(arithmetic.rising(2e-3, steps=50))
    )
    start = supervise(params, known, config.pretrain_steps, begun, seed)
    optimizer = arithmetic.policy_optimizer(config.learning_rate)

    def reinforced(method, control):
        algorithm = method.make(_build(model), config.group_size, pictures.LIMIT)
        batches = _experience(
            config, model, some if control == PART else known, method, algorithm, control, seed
        )
        begin = with_value_head(model, start) if method.critic else start
        state, history = train.fit(
            begin,
            algorithm.objective,
            optimizer,
            batches,
            steps=config.steps,
            key=jax.random.key(seed),
        )
        return state.params, history

    return World(
        start,
        reinforced,
        lambda few: supervise(start, some if few else known, config.steps, optimizer, seed + 1),
        functools.partial(_measured, config, model, start, new, seed),
        pictures.text_prior(known, new),
        config.extra,
    )  # fmt: skip


def _build(model):
    return functools.partial(policy_gradient, model.forward)


def _experience(config, model, known, method, algorithm, control, seed):
    """Rollouts of a method: `prompts_per_step` questions for two updates, or half of them for one."""
    given = pictures.rewards(known.records)
    if control == RANDOM:
        rng = np.random.default_rng(seed)
        given = lambda texts, records: rng.integers(0, 2, len(texts)).astype(np.float32)
    group = config.group_size // (2 if control == NOISY else 1)
    sample = rl.answers(model, pictures.Tokenizer(), given, pictures.sampling(), group)
    sample = noisy_half(sample, NOISE) if control == NOISY else sample
    asked = pictures.asked(known)
    count = max(config.prompts_per_step * method.updates // 2, 1)
    prompts = rl.Prompts(asked.ids, count, asked.records, asked.columns, seed=seed)
    transforms = [rl.add_old_policy(model.forward, 1.0)] if method.updates > 1 else []
    if method.critic and not transforms:
        transforms = [rl.add_values(model.forward)]
    return rl.collect(prompts, sample, algorithm.credit, *transforms, updates=method.updates)


def noisy_half(sample: rl.Sample, deviation: float) -> rl.Sample:
    """Samples groups: half of the answers for the pictures, half for the pictures with noise.

    The batch has the clean pictures for all: NoisyRollout, Liu et al., 2025, arxiv.org/abs/2504.13055.

    Args:
        sample: `answers` with half the group size.
        deviation: standard deviation of the noise, in the unit of the pixels.
    """

    def both(params, asked, key):
        shown = np.asarray(asked.columns["images"])
        noise = deviation * jax.random.normal(stream(key, "noise"), shown.shape)
        blurred = asked._replace(columns={"images": shown + np.asarray(noise)})
        clean = checked(sample(params, asked, key))
        other = checked(sample(params, blurred, stream(key, "noisy")))
        other |= {"images": clean["images"]}
        return interleaved(clean, other, len(asked.ids), asked.columns)[0]

    return both


def _batches(rows, seed, size):
    """Endless random batches of rows."""
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.integers(0, len(rows["tokens"]), size)
        yield {name: x[chosen] for name, x in rows.items()}


def _measured(config, model, start, new, seed, params, shown):
    """The measures of samples for held-out pictures, or for other or blank ones in their places."""
    blank = lambda: np.full_like(new.images, -1.0)
    images = {"own": lambda: None, "other": lambda: pictures.others(new), "blank": blank}[shown]()
    given = pictures.rewards(new.records)
    sample = rl.answers(model, pictures.Tokenizer(), given, pictures.sampling(), config.samples)
    batch = sample(without_value_head(params), pictures.asked(new, images), jax.random.key(seed))
    records = [record for record in new.records for _ in range(config.samples)]
    right = pictures.right(batch["rewards"], records)
    kinds = np.array([record["kind"] for record in records])
    there = np.asarray(rl.policy_log_probs(model.forward, start, model_inputs(batch), 1.0))
    ratio = np.where(batch["completion_mask"], batch["sampler_log_probs"] - there, 0.0)
    return {
        "accuracy": float(right.mean()),
        "skills": {kind: float(right[kinds == kind].mean()) for kind in pictures.SKILLS},
        "reward": float(np.mean(batch["rewards"])),
        "kl": float(ratio.sum(axis=1).mean()),
    }


def of_source(config: Any, task: questions.Task, seed: int) -> World:
    """Returns the world of a source's questions about images."""

    def reinforced(method, control):
        own = task
        if method.critic:
            own = task._replace(params=with_value_head(task.model, task.params))
        algorithm = method.make(_build(task.model), config.group_size, task.settings.max_new_tokens)
        return questions.reinforce(
            own, algorithm, steps=config.steps, seed=seed, learning_rate=config.learning_rate,
            prompts_per_step=config.prompts_per_step * method.updates // 2, updates=method.updates,
            group_size=config.group_size,
        )  # fmt: skip

    def supervise(few):
        rows = config.prompts_per_step * config.group_size // 2
        return questions.fit(
            task, task.params, supervised(task.model.forward), config.learning_rate,
            documents.batches(task, rows, seed), rows, steps=config.steps, key=jax.random.key(seed),
        )[0].params  # fmt: skip

    def measure(params, shown):
        records = task.held_out.records[: config.held_out]
        if shown == "other":
            records = loaded.with_other_media(records)
        asked = questions.asked(task.settings, task.renderer, records)
        found = questions.texts(
            task, without_value_head(params), asked.ids, config.samples, seed, asked.columns
        )
        flat = [text for texts in found for text in texts]
        judged = [record for record in asked.records for _ in range(config.samples)]
        given = np.nan_to_num(np.asarray(task.rewards(flat, judged), float))
        least = 0.5 if config.reward == "box" else 1.0
        return {"accuracy": float((given >= least).mean()), "reward": float(given.mean())}

    return World(task.params, reinforced, supervise, measure, {}, ())
