"""Evaluation: the metrics of an objective over all batches of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.keys import stream
from jaxft.metrics import Mean, Terms
from jaxft.parallel import in_turn, mesh_context, to_host
from jaxft.train.accumulation import as_means
from jaxft.train.batches import iterate, place_batch
from jaxft.train.callbacks import Callback, every
from jaxft.train.step import Objective

EvalStep = Callable[[Any, Any, jax.Array], dict[str, Mean | Terms]]  # (params, batch, key) -> Means


def make_eval_step(objective: Objective) -> EvalStep:
    """Compiles the metrics of an objective, its loss included, as Means."""

    @jax.jit
    def eval_step(params, batch, key):
        loss, metrics = objective(params, batch, key)
        return as_means({"loss": loss} | metrics)

    return eval_step


def evaluate(
    eval_step: EvalStep,
    params: Any,
    batches: Iterable[Any],
    *,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Returns the metrics over all batches as numbers: the sum of totals over the sum of weights.

    Batches count by their weights, so the result does not depend on how the data are split into
    batches. Each batch draws from stream(key, "evaluation", number); the default key is
    jax.random.key(0).
    """
    key = jax.random.key(0) if key is None else key
    parts = []
    for number, batch in enumerate(batches):
        batch, own_key = place_batch(batch, mesh), stream(key, "evaluation", number)
        with mesh_context(mesh):
            parts.append(in_turn(eval_step(params, batch, own_key)))
    if not parts:
        raise ValueError("evaluate: there are no batches.")
    # In float64 on the host: float32 cannot count many millions of tokens exactly.
    total = lambda *x: np.sum(np.stack([np.asarray(part, np.float64) for part in x]), axis=0)
    sums = jax.tree.map(total, *to_host(parts))
    return {name: _value(mean) for name, mean in sums.items()}


def evaluation(
    objective: Objective,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    steps: int = 100,
    prefix: str = "eval/",
    mesh: Mesh | None = None,
) -> Callback:
    """Returns a callback that adds "eval/loss" etc. to the rows of every `steps`-th and the last step.

    Args:
        objective: the training objective, or any (params, batch, key) -> (loss, metrics).
        batches: a list or another iterable that can be iterated repeatedly, or a function that
            returns one.
        steps: steps between two evaluations.
        prefix: prefix of the metrics' names.
        mesh: as for `fit`.
    """
    if hasattr(batches, "__next__"):
        raise ValueError(
            "evaluation: batches is an iterator, which is empty after the first evaluation; pass a "
            "list or a function that returns an iterator."
        )
    eval_step = make_eval_step(objective)

    def measure(state):
        values = evaluate(eval_step, state.params, iterate(batches), key=state.key, mesh=mesh)
        return {prefix + name: value for name, value in values.items()}

    return every(steps, measure)


def _value(mean):
    if isinstance(mean, Terms):
        return sum(map(_value, mean.parts))
    value = mean.total / np.where(mean.weight == 0, 1.0, mean.weight)
    return value.item() if value.ndim == 0 else value
