"""The eleven methods of tram.py, their training and their measurements."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import train
from jaxft.adapters import combine, partition
from jaxft.analysis import epsilon_sharpness
from jaxft.keys import stream
from jaxft.metrics import Mean
from jaxft.objectives import LogitsFn, Objective, function_distance, noise_distance, r3f
from jaxft.optim import (
    asam,
    fisher_sam,
    global_norm,
    sam,
    tram_fisher,
    with_tram,
    with_trust_region,
)

SHARP = ("SAM", "ASAM", "Fisher-SAM")
PENALTIES = ("TRPO", "R3F", "MESA")
RADII = ("TRAM-x", "TRAM-θ_0", "TRAM-θ_{t-1}")  # those whose radius is a distance d
TRAM = (*RADII, "TRAM-Fisher")
METHODS = ("Adam", *SHARP, *PENALTIES, *TRAM)


class Task(NamedTuple):
    """A model, its training data for one seed, and its evaluation splits."""

    logits_fn: LogitsFn
    targets: Callable[[dict], jax.Array]  # batch -> targets
    params: Any
    training: dict[str, Any]  # examples [N, ...]
    rows: np.ndarray  # [steps, B], the examples of each step
    splits: dict[str, dict[str, Any]]  # "validation", "in domain" and other domains


class Method(NamedTuple):
    """Arguments of make_step and fit for a method."""

    objective: Objective
    optimizer: optax.GradientTransformation
    gradient: Any = jax.value_and_grad
    extra_args: dict[str, Callable] | None = None


def method(name: str, task: Task, base: optax.GradientTransformation) -> Method:
    """One of METHODS with the hyperparameters of the paper, appendix B.2; sigma is R3F's."""
    plain = classify(task)
    if name in PENALTIES:
        if name == "R3F":
            return Method(r3f(plain, task.logits_fn, weight=0.1, sigma=0.1), base)
        optimizer = with_trust_region(base, 0.1, decay={"TRPO": 0.0, "MESA": 0.999}[name])
        distance = function_distance(task.logits_fn)
        return Method(plain, optimizer, extra_args={"distance_fn": distance})
    if name in RADII:
        decay = {"TRAM-x": None, "TRAM-θ_0": 1.0, "TRAM-θ_{t-1}": 0.0}[name]
        distance = noise_distance if name == "TRAM-x" else function_distance
        optimizer = watched(with_tram(base, decay))
        return Method(plain, optimizer, extra_args={"distance_fn": distance(task.logits_fn)})
    _, frozen = partition(task.params)
    noised = lambda trainable, *args: classify(task, sigma=0.1)(combine(trainable, frozen), *args)
    gradients = {
        "Adam": jax.value_and_grad,
        "SAM": sam(0.05),
        "ASAM": asam(0.5),
        "Fisher-SAM": fisher_sam(0.1, 0.1),
        "TRAM-Fisher": tram_fisher(noised, 0.1, 0.1),
    }
    return Method(plain, base, gradients[name])


def classify(task: Task, sigma: float = 0.0) -> Objective:
    """Cross-entropy and accuracy, with normal noise on the embedded inputs if sigma > 0."""

    def objective(params, batch, key):
        noise = lambda x: x + sigma * jax.random.normal(stream(key, "noise"), x.shape)
        logits, weights = task.logits_fn(params, batch, key, noise=noise if sigma else None)
        targets = task.targets(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        loss = Mean.of(losses, weights)
        right = (jnp.argmax(logits, axis=-1) == targets) * 1.0
        return loss.value, {"loss": loss, "accuracy": Mean.of(right, weights)}

    return objective


class WatchedState(NamedTuple):
    """The state of `watched`."""

    length: jax.Array  # [] float32
    inner: optax.OptState


def watched(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner`, with the length ‖(point - θ) / θ‖ of the step up to where it asks for its gradient.

    Taken from the point itself, not from the perturbation: what the gradient was evaluated at counts.
    """

    def update(updates, state, params=None, *, grad_fn, **extra):
        lengths = []

        def seen(point, *args):
            lengths.append(global_norm(jax.tree.map(_relative, point, params)))
            return grad_fn(point, *args)

        updates, state = inner.update(updates, state.inner, params, grad_fn=seen, **extra)
        return updates, WatchedState(lengths[0], state)

    init = lambda params: WatchedState(jnp.zeros([], jnp.float32), inner.init(params))
    return optax.GradientTransformationExtraArgs(init, update)


def rounding(params: Any, d: np.ndarray) -> np.ndarray:
    """The error of such a length by rounding: half a unit in the last place of each of n params."""
    n = sum(leaf.size for leaf in jax.tree.leaves(partition(params)[0]))
    # Products and sums in float32 keep 1e-5 of d.
    return 2.0**-24 * np.sqrt(n) * (1 + d) + 1e-5 * d


def train_together(
    name: str, tasks: list[Task], options: dict | None = None
) -> Callable[[float], tuple[list[Any], dict]]:
    """rate -> (params of each task, d and length [task, step]): Adam (0.9, 0.99) with linear decay.

    All tasks, which are of one model, run in one compiled program; `options` are the compiler's.
    """
    steps = len(tasks[0].rows)

    def run(data, rate):
        task = tasks[0]._replace(params=data[0], training=data[1], rows=data[2])
        base = optax.adam(lambda count: rate * train.linear(count / steps), b2=0.99)
        objective, optimizer, gradient, extra_args = method(name, task, base)
        step = train.make_step(objective, optimizer, gradient=gradient, extra_args=extra_args)

        def one(state, chosen):
            state, metrics = step(state, jax.tree.map(lambda a: a[chosen], task.training))
            return state, _trace(metrics, state)

        state = train.init_state(task.params, optimizer, jax.random.key(0))
        state, traced = jax.lax.scan(one, state, task.rows)
        return state.params, traced

    all_tasks = lambda data, rate: jax.lax.map(lambda part: run(part, rate), data)
    together = jax.jit(all_tasks, compiler_options=options)
    parts = [(task.params, task.training, task.rows) for task in tasks]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    def tune(rate):
        params, traced = together(data, rate)
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(len(tasks))]
        return each, jax.tree.map(np.asarray, traced)

    return tune


def train_large(
    name: str,
    tasks: list[Task],
    schedule: Callable[[float], optax.Schedule],
    mesh: Any = None,
) -> Callable[[float], tuple[list[Any], dict]]:
    """Works like `train_together` for a large model, by `fit`; `schedule` maps a rate to a schedule."""

    def one(task, rate):
        made, lengths = method(name, task, optax.adam(schedule(rate), b2=0.99)), []
        # As numbers: the next step overwrites the state.
        watch = lambda number, state: lengths.append(jax.tree.map(float, _trace({}, state)))
        state, history = train.fit(
            task.params, made.objective, made.optimizer,
            ({k: np.asarray(a)[r] for k, a in task.training.items()} for r in task.rows),
            gradient=made.gradient, extra_args=made.extra_args, mesh=mesh,
            callbacks=[train.progress(), train.Callback(on_step=watch)],
        )  # fmt: skip
        traced = [_trace(row, None) | length for row, length in zip(history, lengths, strict=True)]
        return state.params, {k: [t[k] for t in traced] for k in traced[0]}

    def tune(rate):
        params, traced = zip(*(one(task, rate) for task in tasks), strict=True)
        return list(params), {k: np.array([t[k] for t in traced]) for k in traced[0]}

    return tune


def measurer(task: Task, chunk: int, options: dict | None = None) -> Callable[..., dict[str, Any]]:
    """(params, task) -> loss and accuracy on each split, and ε-sharpness on the first training examples.

    Compiled once for all methods and tasks of a model. At once are `chunk` examples at most: all logits of
    a split may be large.
    """
    objective, key = classify(task), jax.random.key(0)
    score = jax.jit(
        lambda params, batch: objective(params, batch, key)[1], compiler_options=options
    )

    @functools.partial(jax.jit, compiler_options=options)
    def sharpness(params, batch):
        trainable, frozen = partition(params)
        loss = lambda t: objective(combine(t, frozen), batch, key)[0]
        return epsilon_sharpness(jax.random.key(1), loss, trainable)

    def on(params, split):
        count = len(jax.tree.leaves(split)[0])
        cut = lambda i: jax.tree.map(lambda a: a[i : i + chunk], split)
        parts = [score(params, cut(i)) for i in range(0, count, chunk)]
        total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        return {name: float(mean.value) for name, mean in total.items()}

    def measure(params, task):
        first = jax.tree.map(lambda a: a[:chunk], task.training)
        found = {name: on(params, split) for name, split in task.splits.items()}
        return found | {"sharpness": float(sharpness(params, first))}

    return measure


def _trace(metrics, state):
    """d and the length, of methods that have them."""
    d = metrics.get("trust_distance")
    found = {} if d is None else {"d": d.value if isinstance(d, Mean) else d}
    if isinstance(getattr(state, "opt_state", None), WatchedState):
        found["length"] = state.opt_state.length
    return found


def _relative(point, theta):
    return jnp.where(theta == 0, 0.0, (point - theta) / jnp.where(theta == 0, 1.0, theta))
