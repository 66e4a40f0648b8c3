"""One optimizer step as a pure function, and its compilation."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.adapters import combine, overwritten, partition
from jaxft.adapters.committing import commit, in_place
from jaxft.adapters.untouched import untouched
from jaxft.keys import stream
from jaxft.metrics import Mean, Terms, is_undivided
from jaxft.optim.estimators import evaluates_at_params
from jaxft.optim.perturbations import global_norm
from jaxft.parallel import mesh_context
from jaxft.train.accumulation import GradientEstimator, accumulate, in_slices
from jaxft.train.books import Books, give, updated, where_good
from jaxft.train.rows import refuse_names
from jaxft.train.state import TrainState

Objective = Callable[..., tuple[jax.Array, dict[str, Any]]]
Step = Callable[..., tuple[TrainState, dict[str, Any]]]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    gradient: GradientEstimator = jax.value_and_grad,
    microbatches: int = 1,
    extra_args: Mapping[str, Callable[..., Any]] | None = None,
    books: Books | None = None,
) -> Step:
    """Returns step(state, batch, good=True) -> (state, metrics), pure and not compiled (see `jit_step`).

    Only the trainable part of the params is differentiated and passed to the optimizer. `objective`
    is called with the key stream(state.key, "objective", state.step). If the loss or the gradient is not
    finite, or `good` is False, nothing changes, not even the step counter; with `good`, a loop that reads
    the metrics one step late can stop at the state before the first bad step.

    The metrics are the objective's and `loss`, `grad_norm` (L2, before clipping), `good` (whether
    the state advanced), `num_tokens` (the weight of the loss, if metrics["loss"] is a Mean or Terms; or the
    total of metrics["num_tokens"], if that is a Mean), `num_input_tokens` (tokens of a batch with `tokens`,
    without padding), `learning_rate` (if the optimizer's state has exactly one such hyperparameter, as with
    optax.inject_hyperparams or `make_optimizer`) and likewise `trust_distance`.

    Args:
        objective: (params, batch, key) -> (loss, metrics). It is traced once more if weights could be
            used in place: an objective that evaluates other params than those given (noise on the weights,
            an inner step) gets a form of the weights that is correct at any params.
        optimizer: any optax transform; a transform with extra arguments gets `value`, `grad`,
            `value_fn(trainable)` and `grad_fn(trainable, *_)` of this batch, and the objective's `metrics`.
        gradient: estimator with the signature of jax.value_and_grad, called with has_aux=True. A custom one
            should declare where it evaluates the objective: see `jaxft.optim.evaluates`.
        microbatches: slices of the batch whose gradients are accumulated. An estimator that evaluates
            more than one point (sam) does so for each slice separately; the optimizer's grad_fn uses the
            whole batch.
        extra_args: further functions that the optimizer needs, name -> fn(params, ..., batch, key)
            with any number of params trees. The optimizer gets name(trainable, ...), which adds the frozen
            part, the batch and its own key: {"distance_fn": function_distance(...)} for `with_tram`. If fn
            returns a Mean, the optimizer gets its value (with microbatches, of the sum over slices); any
            other result is computed from the whole batch at once.
        books: values that the objective reads and the step updates, such as a reference that follows the
            params: name of an entry of the carry -> `Book`. Make the state with init_state(..., books=books).
    """
    books, extra_args = dict(books or {}), _own_names(extra_args)
    estimator = accumulate(gradient, microbatches)
    update = _taking(optax.with_extra_args_support(optimizer).update)

    def step(state, batch, good=True):
        # Commit again: the caller may have changed the trainable part since the last step.
        params = commit(state.params)
        trainable, frozen = partition(params)
        batch = give(books, state.carry, params, batch, microbatches)
        here = lambda t, batch, key: objective(in_place(combine(t, frozen)), batch, key)
        # At params other than the state's, frozen fields do not hold the trainable values.
        whole = lambda t: combine(t, frozen)
        moved = lambda t, batch, key: objective(whole(t), batch, key)
        key = stream(state.key, "objective", state.step)
        estimate = lambda t, fn=moved: estimator(fn, has_aux=True)(t, batch, key)
        extra = {
            name:  # A separate key: a distance's noise must be independent of the objective's dropout.
            _of_batch(fn, whole, batch, stream(key, f"argument {name}"), microbatches)
            for name, fn in extra_args.items()
        }
        stays = _stays(gradient, params, objective, batch, key)
        (loss, metrics), grads = estimate(trainable, here if stays else moved)
        norm = global_norm(grads)
        good = good & jnp.isfinite(loss) & jnp.isfinite(norm)
        extra |= dict(value=loss, grad=grads, metrics=metrics)
        # optax's line searches call it with those extra arguments that its signature names.
        extra["value_fn"] = lambda t, grad_fn=None, metrics=None: estimate(t)[0][0]
        extra["grad_fn"] = lambda t, *_: estimate(t)[1]
        updates, opt_state = update(grads, state.opt_state, trainable, **extra)
        new_state = _advanced(state, good, trainable, frozen, updates, opt_state)
        metrics = _with_standard_metrics(metrics, loss, norm, good, opt_state)
        if (count := _num_input_tokens(batch)) is not None:
            metrics.setdefault("num_input_tokens", count)
        after = partition(new_state.params)[0]
        return new_state._replace(carry=updated(books, state.carry, after, metrics, good)), metrics

    return step


def _own_names(extra_args):
    """Returns the functions as a dict; refuses names of what every optimizer gets."""
    taken = {"value", "grad", "value_fn", "grad_fn", "metrics"} & (extra_args or {}).keys()
    if taken:
        raise ValueError(
            f"make_step: extra_args may not name {sorted(taken)}: they are given anyway."
        )
    return dict(extra_args or {})


def _taking(update: Callable[..., Any]) -> Callable[..., Any]:
    """`update` with only those extra arguments that its signature accepts: optax.contrib.sam's has none."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return update
    names = {p.name for p in parameters}
    return lambda *args, **extra: update(*args, **{n: extra[n] for n in extra if n in names})


def jit_step(step: Step) -> Step:
    """Compiles `step`; it overwrites what it changes: do not use the old state afterwards.

    It donates the step counter, trainable leaves, optimizer state, carry and all of a weight that has
    `committed`. Other frozen leaves are inputs only: they are not copied, and other holders keep them.
    On a mesh, each leaf keeps its sharding, and the mesh is in context.
    `.lower(state, batch)` works as that of jax.jit.
    """

    @functools.cache
    def compiled(treedef, shardings):
        moves = _moving(treedef)
        mesh = next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)

        def run(moving, still, *inputs):
            state, metrics = step(treedef.unflatten(_merge(moves, moving, still)), *inputs)
            return _pick(jax.tree.leaves(state), moves), metrics

        # Without this the compiler may change the output's sharding, and the next call recompiles.
        pinned = [
            s if isinstance(s, jax.sharding.NamedSharding) else None
            for s in _pick(shardings, moves)
        ]
        replicated = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.jit(run, donate_argnums=0, out_shardings=(pinned, replicated)), moves, mesh

    def split(state):
        leaves, treedef = jax.tree.flatten(state)
        run, moves, mesh = compiled(
            treedef, tuple(getattr(leaf, "sharding", None) for leaf in leaves)
        )
        still = _pick(leaves, [not m for m in moves])
        return run, treedef, moves, mesh, _pick(leaves, moves), still

    def run_step(state, batch, *good):
        run, treedef, moves, mesh, moving, still = split(state)
        with mesh_context(mesh):
            moving, metrics = run(moving, still, batch, *good)
        return treedef.unflatten(_merge(moves, moving, still)), metrics

    def lower(state, batch, *good):
        run, _, _, mesh, moving, still = split(state)
        with mesh_context(mesh):
            return run.lower(moving, still, batch, *good)

    run_step.lower = lower
    return run_step


def guarded(step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]) -> Step:
    """Converts a user's `step(state, batch) -> (state, metrics)` to the form that `jit_step` takes.

    Counts the steps, and leaves the state unchanged if a metric is not finite, as `make_step` does. Raises
    ValueError while tracing if the step changes the structure of the state, a shape or a dtype.
    """

    def run(state, batch, good=True):
        new, metrics = step(state, batch)
        refuse_names(metrics, ("good",), "run_steps: the step")
        numbers = [m.value if isinstance(m, Mean | Terms) else m for m in metrics.values()]
        finite = [jnp.all(jnp.isfinite(jnp.asarray(n, jnp.float32))) for n in numbers]
        good = functools.reduce(jnp.logical_and, finite, jnp.asarray(good))
        own = lambda state: state._replace(step=None, key=None)  # the loop owns both
        kept = where_good(good, own(new), own(state), "run_steps: the step")
        return kept._replace(step=state.step + good, key=state.key), metrics | {"good": good}

    return run


def _advanced(state, good, trainable, frozen, updates, opt_state):
    """Returns the state after the updates, or the old state if not `good`."""
    # Select between updates, not params: a select between whole trees would keep both.
    updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
    trainable = optax.apply_updates(trainable, updates)
    return TrainState(
        step=state.step + good,
        params=commit(combine(trainable, frozen)),
        opt_state=jax.tree.map(lambda n, o: jnp.where(good, n, o), opt_state, state.opt_state),
        carry=state.carry,
        key=state.key,
    )


def _stays(gradient, params, objective, batch, key):
    """Returns whether the objective may get the params in their form for use in place."""
    stays, placed = evaluates_at_params(gradient), in_place(params)
    if jax.tree.structure(placed) == jax.tree.structure(params):
        return True  # They have no other form.
    if stays and not untouched(objective, placed, batch, key):
        warnings.warn(
            "make_step: the objective changes its params before a model reads them (noise, an inner step, a "
            "cast), so weights that could be used in place (PaCA's) take their slower form, which is right "
            "anywhere. An objective that changes only the trainable part of `partition(params)` gets that "
            "form without this warning.",
            stacklevel=3,
        )
        return False
    if stays is None:
        name = getattr(gradient, "__qualname__", type(gradient).__name__)
        warnings.warn(
            f"make_step: the gradient estimator {name} does not say where it evaluates its objective, so "
            "weights that could be used in place (PaCA's) take their slower form, which is right anywhere. "
            "Decorate it with jaxft.optim.evaluates(at_params=True) if it evaluates only the given params, "
            "else with at_params=False.",
            stacklevel=3,
        )
    return bool(stays)


def _of_batch(fn, whole, batch, key, microbatches):
    """Returns (trainable, ...) -> fn(whole params, batch, key), with a Mean replaced by its value."""

    def run(*trees):
        # Compiled as a part of the step; like this it is traced once, for its shapes and its values.
        of = jax.jit(lambda batch, key: fn(*map(whole, trees), batch, key), inline=True)
        kind = jax.eval_shape(of, batch, key)
        if not isinstance(kind, Mean | Terms):
            return of(batch, key)
        parts = 1 if is_undivided(kind) else microbatches
        return in_slices(of, batch, key, parts).value

    return run


def _with_standard_metrics(metrics, loss, norm, good, opt_state):
    refuse_names(metrics, ("grad_norm", "good"), "make_step: the objective")
    metrics = {"loss": loss} | metrics | {"grad_norm": norm, "good": good}
    if isinstance(metrics["loss"], Mean | Terms):
        metrics.setdefault("num_tokens", metrics["loss"].weight)
    if isinstance(metrics.get("num_tokens"), Mean):  # its total is a sum over microbatches
        metrics["num_tokens"] = metrics["num_tokens"].total
    for name in ("learning_rate", "trust_distance"):
        found = optax.tree_utils.tree_get_all_with_path(opt_state, name)
        found = [
            value for _, value in found if isinstance(value, jax.Array)
        ]  # excludes a schedule's state
        if len(found) == 1:
            metrics.setdefault(name, found[0])
    return metrics


def _num_input_tokens(batch):
    """Tokens [...] of a batch that are not padding, in all rows; None for a batch of anything else."""
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    if tokens is None:
        return None
    real = batch.get("segment_ids")
    return jnp.float32(tokens.size) if real is None else jnp.sum(real > 0, dtype=jnp.float32)


@functools.cache
def _moving(treedef):
    """Returns for each leaf of a TrainState whether a step changes it."""
    state = treedef.unflatten(range(treedef.num_leaves))
    everything = lambda node: jax.tree.map(lambda _: True, node)
    moves = TrainState(
        step=True,
        params=overwritten(state.params),
        opt_state=everything(state.opt_state),
        carry=everything(state.carry),
        key=False,
    )
    return tuple(jax.tree.leaves(moves))


def _pick(leaves, mask):
    return [leaf for leaf, m in zip(leaves, mask, strict=True) if m]


def _merge(mask, first, second):
    first, second = iter(first), iter(second)
    return [next(first) if m else next(second) for m in mask]
