"""The training loop, for every objective, optimizer, gradient estimator and mesh."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxft.adapters.committing import commit, writes_back
from jaxft.parallel import in_turn
from jaxft.train.accumulation import GradientEstimator
from jaxft.train.batches import (
    Batches,
    BatchSource,
    is_function,
    place_batch,
    place_on_mesh,
    with_start,
)
from jaxft.train.books import Books
from jaxft.train.callbacks import Callback, Row, Run, as_callbacks
from jaxft.train.checkpoints import Checkpoints, open_checkpoints, what_is_saved
from jaxft.train.errors import (
    IN_TRAINING,
    INTERRUPTED,
    PREEMPTED,
    DivergedError,
    OutputError,
    PreemptedError,
    is_refusal,
)
from jaxft.train.rows import Rows
from jaxft.train.signals import catch_preemption
from jaxft.train.state import TrainState, init_state
from jaxft.train.step import Objective, Step, guarded, jit_step, make_step
from jaxft.weights import is_weight


def fit(
    params: Any,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    *,
    steps: int | None = None,
    key: jax.Array | None = None,
    carry: Any = None,
    gradient: GradientEstimator = jax.value_and_grad,
    microbatches: int = 1,
    extra_args: Mapping[str, Callable[..., Any]] | None = None,
    books: Books | None = None,
    mesh: Mesh | None = None,
    callbacks: Iterable[Callback | Callable[[Row], None]] = (),
    checkpoints: Checkpoints | None = None,
    donate: bool = False,
) -> tuple[TrainState, list[Row]]:
    """Trains and returns (state, history): history[i] has the metrics of one step as numbers.

    Args:
        params: a params tree, which stays usable unless `donate`; or a TrainState, which is donated.
        objective: (params, batch, key) -> (loss, metrics).
        optimizer: any optax transform; it sees the trainable part only.
        batches: an iterable of pytrees, or for experience a function collect(params, carry, key) ->
            (batch, carry), called before each step with the state's params and carry and the key
            stream(state.key, "collect", step). Its state (a replay buffer, environment states, the rest of
            a rollout) is in the carry, whose entries keep their shapes. If the function has an attribute
            `carry`, a dict of named entries, the run starts with those that its carry lacks
            (`jaxft.rl.collect` returns such a function). On a mesh, each process gives its own rows.
        steps: optimizer steps at which the run ends, including those of a restored state; None: until
            the batches run out.
        key: typed key for all random draws of the run; default jax.random.key(0).
        carry: initial value of any further pytree of arrays that the run updates and saves; must be a dict
            of named entries if batches or books add entries. See `init_state`.
        gradient, microbatches, extra_args, books: see `make_step`.
        mesh: lays rows of batches over its data, fsdp and expert axes. Lay out the params first
            (jaxft.parallel.shard_params): arrays that are not on the mesh are copied to all its devices.
        callbacks: Callbacks, or functions of a row.
        checkpoints: where and when to save, and whether to resume; with it, SIGTERM and the first
            SIGINT end the run after its current step with PreemptedError (exit code 75, or 130 of SIGINT).
        donate: donates `params` (see `init_state`): full fine-tuning then holds one model, not two. On a
            mesh, lay them out first.

    Raises:
        DivergedError: if a loss or gradient is not finite; no such state is ever saved, and the error
            has the previous state (except for later changes of the carry by a collect function).
        PreemptedError: after a signal, once everything is saved.
        OutputError: if a path is not writable or the disk is full; raised before the first step if it can
            be detected then. Later, the error has the state and the history so far.
    """
    step = make_step(
        objective,
        optimizer,
        gradient=gradient,
        microbatches=microbatches,
        extra_args=extra_args,
        books=books,
    )
    state = _start(params, optimizer, key, carry, mesh, books, donate)
    return run_steps(
        state, step, batches, steps=steps, mesh=mesh, callbacks=callbacks, checkpoints=checkpoints
    )


def run_steps(
    state: TrainState,
    step: Step | Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: Batches,
    *,
    steps: int | None = None,
    mesh: Mesh | None = None,
    callbacks: Iterable[Callback | Callable[[Row], None]] = (),
    checkpoints: Checkpoints | None = None,
) -> tuple[TrainState, list[Row]]:
    """Runs the loop of `fit` over any step, for updates that are not one gradient of one objective.

    `state.carry` holds everything else that the step changes (replay buffer, target networks, environment
    states, a federated round): it is laid out, donated, saved and restored with params and optimizer state.

    Args:
        state: see `init_state`; it is donated.
        step: a pure function (state, batch) -> (state, metrics): the loop counts the steps, and stops before
            the first whose metrics are not finite. Or a step of `make_step`, (state, batch, good), which
            does both itself.
        batches, steps, mesh, callbacks, checkpoints: see `fit`. A step that collects its own experience
            takes empty batches: `itertools.repeat({}, n)`.

    Returns, Raises: see `fit`.
    """
    if steps is None and is_function(batches):
        raise ValueError("fit: batches is a collect function and never ends; pass steps=...")
    step = step if "good" in inspect.signature(step).parameters else guarded(step)
    _check_alive(state, "this TrainState")
    state = place_on_mesh(with_start(state, batches), mesh)
    source, callbacks = BatchSource(batches), as_callbacks(callbacks)
    ended = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_output_errors(checkpoints, ended))
        stack.callback(source.close)
        saver = stack.enter_context(open_checkpoints(checkpoints, state))
        state, restored = saver.restore(state, source)
        rows = Rows(callbacks, restored)
        preempted = lambda number: None
        if checkpoints is not None:
            preempted = stack.enter_context(catch_preemption())
        stack.enter_context(_started(callbacks, Run(int(state.step), steps, list(restored))))
        state = _loop(jit_step(step), state, source, steps, mesh, callbacks, rows, saver, preempted)
        ended.append((state, rows.history))
    return state, rows.history


def _loop(run, state, source, steps, mesh, callbacks, rows, saver, preempted):
    first = number = int(state.step)
    good = place_on_mesh(jnp.array(True), mesh)
    try:
        while steps is None or number < steps:
            batch, state = source.next(state, number, mesh)
            if batch is None:
                _warn_if_early(number, steps)
                if number > first:
                    rows.amend(_call(callbacks, "on_last", number, state))
                break
            state, metrics = run(state, place_batch(batch, mesh), good)
            number, good = number + 1, in_turn(metrics)["good"]
            extra = _call(callbacks, "on_step", number, state)
            rows.push(number, metrics, extra)
            saver.check()
            signal = preempted(number)
            if signal or saver.due(number, extra):
                rows.flush()  # A state is saved only after its step is known to be good.
                saver.save(state, source, rows.history)
            if signal:
                saver.wait()
                code = INTERRUPTED if signal == "SIGINT" else PREEMPTED
                raise PreemptedError(
                    f"{signal} at step {number}; saved, start again with resume=True (--resume)",
                    code,
                )
        rows.flush()
        saver.save(state, source, rows.history)
        return _with_rows_written(state) if number == first > 0 else state
    except (DivergedError, OutputError) as error:
        error.state, error.history = state, rows.history
        raise
    except Exception as error:
        # An input that the first step refuses is the user's mistake; nothing is trained yet.
        if number > first or not is_refusal(error):
            error.add_note(f"{IN_TRAINING} {number}")
        raise


def _with_rows_written(state):
    """Writes the trained rows into their kernels, as a step does, for a run with no step left.

    A checkpoint holds only the rows, and each step writes them at its start.
    """
    if not any(map(writes_back, jax.tree.leaves(state.params, is_leaf=is_weight))):
        return state
    write = lambda state, batch: (state._replace(params=commit(state.params)), {})
    return jit_step(write)(state, {})[0]


def _start(params, optimizer, key, carry, mesh, books, donate):
    if isinstance(params, TrainState):
        if key is not None or carry is not None:
            raise ValueError("fit: a TrainState has its own key and carry; pass neither with it.")
        return params
    _check_alive(params, "these params")
    key = jax.random.key(0) if key is None else key
    # Place the params on the mesh first: the optimizer's state takes their shardings.
    params = place_on_mesh(params, mesh)
    return init_state(params, optimizer, key, carry, books=books, donate=donate)


def _check_alive(tree, what):
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree)):
        raise ValueError(
            f"fit: arrays of {what} were deleted: an earlier run donated them, as it does with a TrainState "
            "and, with donate=True, with params. Continue with the state that it returned, or create them "
            "again; jax.tree.map(jax.numpy.copy, ...) before a run keeps a copy."
        )


@contextlib.contextmanager
def _started(callbacks, run):
    for callback in callbacks:
        if callback.on_start:
            callback.on_start(run)
    error = None
    try:
        yield
    except BaseException as ended:
        error = ended
        raise
    finally:
        _end(callbacks, error)


def _end(callbacks, error):
    """Calls each on_end, even if one fails; raises the first failure unless the run itself failed."""
    failures = []
    for callback in callbacks:
        try:
            if callback.on_end:
                callback.on_end(error)
        except Exception as failure:
            failures.append(failure)
    for failure in failures:
        if error is None:
            raise failure
        error.add_note(f"at the end, {failure}")


@contextlib.contextmanager
def _output_errors(checkpoints, ended):
    """Adds to OutputErrors of a started run what is saved, and attaches its state and history."""
    try:
        yield
    except OutputError as error:
        state, history = ended[0] if ended else (error.state, error.history)
        if state is None:
            raise
        number = history[-1]["step"] if history else 0
        whole = OutputError(f"after step {number}: {error} {what_is_saved(checkpoints)}")
        whole.state, whole.history = state, history
        raise whole from error


def _call(callbacks, name, number, state):
    """Returns the metrics that the callbacks' on_step or on_last add to the row of a step."""
    extra = {}
    for function in (getattr(callback, name) for callback in callbacks):
        extra |= (function(number, state) or {}) if function else {}
    return extra


def _warn_if_early(number, steps):
    if steps is not None:
        warnings.warn(
            f"fit: batches ended after {number} of {steps} steps; repeat the data or lower steps.",
            stacklevel=4,
        )
