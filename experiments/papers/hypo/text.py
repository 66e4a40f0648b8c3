"""A small language model for hypo.py: DPO, HyPO and online RLOO with the same pairs, or the true reward.

Texts of twelve words: some are good, and after the fourth good one most are bad. The reward counts good
words and subtracts bad ones. Pairs are texts of the model itself without a bad word, judged by their
good ones: that more good words turn into bad ones is not in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.worlds import toy_text as toy
from jaxft import train
from jaxft.keys import stream
from jaxft.losses import dpo_loss, leave_one_out
from jaxft.models import Decoder, Forward
from jaxft.objectives import Objective, hypo, policy_gradient, preference, sequence_log_probs
from jaxft.objectives.policy import sequence_sum
from jaxft.rl.token_losses import reinforce

TOPICS, GOOD, BAD, NEUTRAL = 3, (3, 6), (6, 9), (9, 15)  # ids; topics come first
LENGTH, TURN = 12, 4  # words of a text; good ones after which most are bad
METHODS = ("DPO", "HyPO", "RLOO")


class Settings(NamedTuple):
    """Sizes and rates; all methods share them."""

    pretrain_steps: int = 400
    steps: int = 300
    every: int = 10  # steps between measurements
    texts: int = 4096  # texts for the pairs
    batch_size: int = 32  # pairs
    prompts: int = 32  # prompts per step of fresh samples, in HyPO and RLOO
    samples: int = 4  # samples per prompt
    held_out: int = 512  # fresh samples per measurement
    width: int = 64
    layers: int = 2
    learning_rate: float = 1e-3
    beta: float = 0.5
    kl_weight: float = 0.03  # HyPO's λ


def language(rng: np.random.Generator, count: int) -> dict[str, jax.Array]:
    """Texts to pretrain on; topics differ in how many good words they have."""
    topics = rng.integers(0, TOPICS, count)
    so_far, words = np.zeros(count, int), []
    for _ in range(LENGTH):
        shares = np.where((so_far < TURN)[:, None], *_shares(topics))
        kind = (rng.random((count, 1)) > np.cumsum(shares, axis=1)[:, :2]).sum(axis=1)
        draws = [rng.integers(*span, count) for span in (GOOD, BAD, NEUTRAL)]
        words.append(np.choose(kind, draws))
        so_far += kind == 0
    return toy.rows(jnp.asarray(topics[:, None]), jnp.asarray(np.stack(words, 1)))


def _shares(topics):
    """Probabilities [B, 3] of good, bad and neutral words, before and after the turn."""
    good = 0.15 + 0.05 * topics
    before = np.stack([good, np.zeros(len(topics)), 1 - good], axis=1)
    return before, np.array([[0.01, 0.89, 0.1]])


def count(words: jax.Array, kind: tuple[int, int]) -> jax.Array:
    """Counts the words of a kind on the last axis."""
    return jnp.sum((words >= kind[0]) & (words < kind[1]), axis=-1, dtype=jnp.float32)


def reward(words: jax.Array) -> jax.Array:
    """Good words minus bad ones."""
    return count(words, GOOD) - count(words, BAD)


def make_pairs(words: np.ndarray, topics: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """{"topics" [P], "pairs" [P, 2, N]}: texts of one topic, none with bad words, chosen first.

    Labels are drawn by Bradley and Terry's model of the numbers of good words, which differ.
    """
    clean = np.flatnonzero(np.asarray(count(words, BAD)) == 0)
    clean = clean[np.argsort(topics[clean], kind="stable")]
    first, second = clean[:-1:2], clean[1::2]
    good = np.asarray(count(words, GOOD))
    fit = (topics[first] == topics[second]) & (good[first] != good[second])
    first, second = first[fit], second[fit]
    wins = rng.random(len(first)) < 1 / (1 + np.exp(good[second] - good[first]))
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    return {"topics": topics[first], "pairs": np.stack([words[chosen], words[rejected]], axis=1)}


def run(settings: Settings, seed: int) -> dict[str, list[dict[str, float]]]:
    """For each method, what was measured at the start and every so many steps."""
    model = toy.decoder(NEUTRAL[1], 2 * LENGTH, settings.width, settings.layers)
    rng = np.random.default_rng(seed)
    base = toy.pretrain(
        model, functools.partial(language, count=64), settings.pretrain_steps, 3e-3, seed
    )
    topics = rng.integers(0, TOPICS, settings.texts)
    sample = toy.sampler(model, LENGTH)
    words, *_ = sample(base, jnp.asarray(topics[:, None]), jax.random.key(seed))
    pairs = make_pairs(np.asarray(words), topics, rng)
    measured = functools.partial(measure, model, base, pairs, settings=settings)
    start = measured(base, jax.random.key(seed + 1)) | {"step": 0, "pairs": len(pairs["topics"])}
    return compare(
        METHODS,
        base,
        start,
        measured,
        lambda name: method(name, model, base, pairs, settings),
        lambda: optax.adam(settings.learning_rate),
        every=settings.every,
        steps=settings.steps,
        seed=seed,
    )


def compare(
    methods: Sequence[str],
    params: Any,
    start: dict[str, float],
    measured: Callable[[Any, jax.Array], dict[str, float]],
    made: Callable[[str], tuple[Objective, Any]],
    optimizer: Callable[[], optax.GradientTransformation],
    *,
    every: int,
    steps: int,
    seed: int,
    callbacks: Callable[[], Sequence[Callable]] = tuple,
    **more: Any,
) -> dict[str, list[dict[str, float]]]:
    """Trains each method from `params`; returns {method: `start` and what was measured every so many steps}.

    Args:
        methods: names.
        params: where all methods start.
        start: what was measured there.
        measured: (params, key) -> measurements.
        made: name -> (objective, batches or collect function).
        optimizer: makes the optimizer of a method.
        every: steps between measurements.
        steps: steps of each method.
        seed: of the keys.
        callbacks: makes further callbacks of a method.
        more: arguments of `train.fit`.
    """
    found = {}
    for name in methods:
        rows = [start]

        def look(state, rows=rows):
            value = measured(state.params, stream(state.key, "measure"))
            rows.append(value | {"step": int(state.step)})
            return {}

        objective, batches = made(name)
        train.fit(
            params,
            objective,
            optimizer(),
            batches,
            steps=steps,
            key=jax.random.key(seed),
            callbacks=[train.every(every, look), *callbacks()],
            **more,
        )
        found[name] = rows
    return found


def method(name: str, model: Decoder, base: Any, pairs: dict[str, Any], settings: Settings):
    """(objective, its collect function) of a method; only RLOO sees the true reward."""
    draw = _draw(name, model, settings)
    data = jax.tree.map(jnp.asarray, pairs)
    collect = lambda params, carry, key: (draw(params, base, data, key), carry)
    return objective(name, model.forward, settings), collect


def objective(name: str, forward: Forward, settings: Settings) -> Objective:
    """Returns the objective of a method, at any size."""
    loss = functools.partial(dpo_loss, beta=settings.beta)
    objectives = {
        "DPO": preference(forward, loss, beta=settings.beta),
        "HyPO": hypo(forward, loss, beta=settings.beta, kl_weight=settings.kl_weight),
        "RLOO": policy_gradient(forward, reinforce(), sequence_sum),
    }
    return objectives[name]


@functools.cache
def _draw(name, model, settings):
    """A compiled function of (params, base, data, key): pairs, fresh samples or both."""
    sample = toy.sampler(model, LENGTH)

    @jax.jit
    def batch(params, base, data, key):
        ref = functools.partial(_sums, model, base)
        rows, fresh, words = jax.random.split(key, 3)
        offline = {}
        if name != "RLOO":
            chosen = jax.random.randint(rows, (settings.batch_size,), 0, len(data["topics"]))
            topics, texts = data["topics"][chosen], data["pairs"][chosen]
            offline = toy.rows(topics[:, None, None], texts)
            offline["ref_log_probs"] = ref(offline)
        if name == "DPO":
            return offline
        topics = jax.random.randint(fresh, (settings.prompts,), 0, TOPICS)
        topics = jnp.repeat(topics, settings.samples)[:, None]
        texts, *_ = sample(params, topics, words)
        groups = lambda x: x.reshape(settings.prompts, settings.samples, -1)
        online = toy.rows(groups(topics), groups(texts))
        online["ref_log_probs"] = ref(online)
        if name == "HyPO":
            return offline | {"online": online}
        # The KL as a part of the reward, as RLHF has it.
        ratios = _sums(model, params, online) - online["ref_log_probs"]
        value = reward(texts) - settings.beta * ratios.reshape(-1)
        return experience(topics, texts, value - leave_one_out(value, settings.samples))

    return batch


def experience(topics: jax.Array, words: jax.Array, advantages: jax.Array) -> dict[str, jax.Array]:
    """Returns the batch of `policy_gradient` from whole texts."""
    tokens = jnp.concatenate([topics, words], axis=1)
    return {
        "tokens": tokens,
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "completion_mask": jnp.ones(words.shape, bool),
        "sampler_log_probs": jnp.zeros(words.shape),  # Used only for a logged gap, not here.
        "advantages": advantages,
    }


def measure(model, base, pairs, params, key, *, settings: Settings) -> dict[str, float]:
    """Means over fresh samples of a policy, and over its pairs."""
    topics, words = jax.random.split(key)
    topics = jax.random.randint(topics, (settings.held_out, 1), 0, TOPICS)
    texts, *_ = toy.sampler(model, LENGTH)(params, topics, words)
    sums = _jitted_sums(model)
    of = lambda params, topics, texts: sums(params, toy.rows(topics[:, None], texts[:, None]))
    ratios = of(params, topics, texts) - of(base, topics, texts)
    some = slice(0, settings.held_out)
    chosen = of(params, pairs["topics"][some, None], pairs["pairs"][some, 0])
    return {
        "reward": float(jnp.mean(reward(texts))),
        "kl": float(jnp.mean(ratios)),
        "good": float(jnp.mean(count(texts, GOOD))) / LENGTH,
        "bad": float(jnp.mean(count(texts, BAD))) / LENGTH,
        "log_prob_chosen": float(jnp.mean(chosen)),
    }


def _sums(model, params, batch):
    return sequence_log_probs(model.forward, params, batch).sums


@functools.cache
def _jitted_sums(model):
    return jax.jit(functools.partial(_sums, model))
