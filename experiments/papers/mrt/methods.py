"""The methods of MRT's script: (config, world, seed) -> (params, tokens that training cost).

`config` is the Config of experiments/papers/mrt/main.py. Tokens are those that are sampled, and those of
forced answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.papers.mrt.worlds import EPISODES, World
from jaxft import rl
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_mean
from jaxft.parallel import mesh_context
from jaxft.rl.forced import prefixes_of
from jaxft.rl.progress import shortened
from jaxft.rl.rollouts import rows_of
from jaxft.rl.token_losses import clipped, reinforce


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
    extra = lambda row: (row["episodes"] + 1) * world.cost if "episodes" in row else 0
    return state.params, round(sum((row["length"] + extra(row)) * rows for row in history))


def build(world: World) -> Callable[..., Any]:
    """Returns `policy_gradient` of the world's model."""
    return functools.partial(policy_gradient, world.model.forward)


def grpo(config: Any, world: World, seed: int, *transforms: Any) -> tuple[Any, int]:
    """Trains on the outcome."""
    credit = rl.grpo(build(world), config.group_size).credit
    algorithm = rl.Algorithm(credit, build(world)(clipped(), token_mean))
    return train_rl(config, world, seed, algorithm, *transforms)


def grpo_lenpen(config: Any, world: World, seed: int) -> tuple[Any, int]:
    """Trains on the outcome minus a penalty of the length."""
    return grpo(
        config, world, seed, rl.add_penalty(lambda n: -config.penalty * np.asarray(n) / world.limit)
    )


def mrt_online(config: Any, world: World, seed: int) -> tuple[Any, int]:
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


def mrt_stale(config: Any, world: World, seed: int) -> tuple[Any, int]:
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


def star(config: Any, world: World, seed: int) -> tuple[Any, int]:
    """Fine-tunes on right answers of the start, without what follows the most progress."""
    rows = config.prompts_per_step * config.group_size
    count = max(1, rows * config.steps // len(world.known.ids) // 2)
    batch = traces(world, seed, count)
    own = shorter(batch)
    chosen = np.flatnonzero(batch["rewards"] >= 1)
    if not len(chosen):
        raise ValueError("star: the start has no right answer; raise --until.")
    rng = np.random.default_rng(seed)
    batches = (rows_of(own, rng.choice(chosen, rows)) for _ in range(config.steps))
    objective = build(world)(reinforce(), token_mean)
    state, _ = world.fit(objective, batches, rows, steps=config.steps, key=jax.random.key(seed))
    forced = int((batch["episode_ends"] >= 0).sum()) * world.cost
    return state.params, int(batch["completion_mask"].sum()) + forced


def shorter(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns rows of `policy_gradient` with `shortened` answers and advantage 1."""
    size = batch["completion_mask"].shape[1]
    kept = shortened(batch)
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


METHODS = {f.__name__: f for f in (grpo, grpo_lenpen, mrt_online, mrt_stale, star)}
