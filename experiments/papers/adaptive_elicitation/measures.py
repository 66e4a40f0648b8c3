"""Measurements of adaptive elicitation: scores of policies, and distances from exact Bayes."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from experiments.papers.adaptive_elicitation.worlds import World
from jaxft import analysis, metrics
from jaxft.analysis.elicitation import ElicitationEnv, ProbsFn, Trace
from jaxft.keys import stream


def episodes(config: Any, world: World, key, answers, number: int) -> ElicitationEnv:
    """Episodes of the config's sizes with entities of `answers`."""
    return analysis.draw_episodes(
        key, answers, number, kinds=len(world.questions.replies[0]), targets=config.targets,
        candidates=config.pool, rounds=config.questions, always=world.always,
    )  # fmt: skip


def measure(config: Any, world: World, probs_fn: ProbsFn, key: jax.Array) -> dict[str, Any]:
    """Scores of all policies on test episodes; look-ahead; comparisons with exact Bayes."""
    ask = lambda env, policy, model: analysis.run_elicitation(
        env, policy, model, stream(key, "policy")
    )
    policies = {
        "random": (analysis.random_policy, probs_fn),
        "most uncertain": (analysis.most_uncertain(probs_fn), probs_fn),
        "EIG": (analysis.greedy(probs_fn), probs_fn),
    }
    if world.exact:
        policies["exact EIG"] = (analysis.greedy(world.exact), world.exact)
    env = episodes(config, world, stream(key, "test"), world.test, config.episodes)
    traces = {name: ask(env, *pair) for name, pair in policies.items()}
    found = {"policies": {name: scored(world, env, trace) for name, trace in traces.items()}}
    number = config.episodes if world.exact else config.ahead
    if number:
        # Exact Bayes costs little, and leaves only the planner to compare.
        model = world.exact or probs_fn
        env = episodes(config, world, stream(key, "look-ahead"), world.test, number)
        both = {"greedy": analysis.greedy(model), "look-ahead": analysis.look_ahead(model)}
        found["ahead"] = {n: scored(world, env, ask(env, p, model)) for n, p in both.items()}
    return found | ({"exact": compared(world.exact, traces["EIG"])} if world.exact else {})


def scored(world: World, env: ElicitationEnv, trace: Trace) -> dict[str, Any]:
    """Metrics of the targets' predictions after 0, 1, ... questions; "atypical": NLL of rare true answers."""
    labels = np.broadcast_to(env.labels, trace.probs.shape[:-1])
    nll = metrics.nll(trace.probs, labels)
    # Clearly fewer than half of the training entities gave such an answer; medians split tumours in half.
    share = (world.training[:, :, None] == np.arange(env.kinds)).mean(axis=0)
    rare = share[env.targets, env.labels] / share.sum(axis=-1)[env.targets] < 0.45
    over = lambda x: np.mean(x, axis=(1, 2)).tolist()
    return {
        "nll": over(nll),
        "accuracy": over(trace.probs.argmax(axis=-1) == labels),
        "brier": over(metrics.brier(trace.probs, labels)),
        "ece": [metrics.ece(p, y) for p, y in zip(trace.probs, labels, strict=True)],
        "atypical": nll[:, rare].mean(axis=1).tolist() if rare.any() else [math.nan] * len(nll),
    }


def compared(exact: ProbsFn, trace: Trace) -> dict[str, Any]:
    """The learned model against exact Bayes at the same turns: predictions, EIG and regret, by round."""
    turns = trace.turns[:-1]
    true = np.stack([analysis.greedy(exact)(turn, None) for turn in turns])
    free = np.stack([turn.available for turn in turns])
    best = np.where(free, true, -np.inf).max(axis=2)
    chosen = np.take_along_axis(true, trace.choices[..., None], axis=2)[..., 0]
    at_random = np.sum(true * free, axis=2) / free.sum(axis=2)
    pairs = zip(true, trace.scores, free, strict=True)
    probs = np.stack([exact(turn.history, turn.targets) for turn in trace.turns])
    return {
        "gap": float(np.abs(trace.probs - probs).mean()),
        "correlation": [float(np.corrcoef(t[f], s[f])[0, 1]) for t, s, f in pairs],
        "regret": (best - chosen).mean(axis=1).tolist(),
        "random_regret": (best - at_random).mean(axis=1).tolist(),
    }
