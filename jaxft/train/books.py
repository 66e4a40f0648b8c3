"""Books: carry entries that a step updates and its objective reads: moving references, running means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.metrics import Mean, Terms, with_mean
from jaxft.parallel import path_name
from jaxft.train.accumulation import as_means, joined, split_batch

Entry = Any  # a pytree of arrays, at state.carry[name] for make_step(books={name: book})


class Book(NamedTuple):
    """Three pure functions for one entry of the carry, called by the step of `make_step`.

    start(params) -> entry: the entry at the beginning of the run, from the whole params tree.
    give(entry, params, batch) -> {column: value}: columns added to the objective's batch. The compiled step
        computes them once, from the whole params of the state, and without a gradient. A value is a scalar,
        or a column [B, ...] of which each row depends on its own row (with microbatches slice by slice).
    update(entry, trainable, metrics) -> entry: the entry after the step, from the trainable part of the new
        params and the metrics of the step. After a step that is not `good` the entry is unchanged.
    """

    start: Callable[[Any], Entry]
    give: Callable[[Entry, Any, Any], Mapping[str, Any]]
    update: Callable[[Entry, Any, Mapping[str, Any]], Entry]


Books = Mapping[str, Book]


def running_mean(metric: str, *, column: str = "running") -> Book:
    """Returns a book with the mean of a metric over all steps so far.

    The batch gets `column`, (mean, weight), two float32 scalars. The mean uses the weights of the metric's
    `Mean`s; a plain number is weighted like the loss.

    Args:
        metric: a name among the objective's metrics.
        column: its name in the batch. BCO reads `running`, the mean of "rewards/mean".
    """

    def update(entry, trainable, metrics):
        del trainable
        if metric not in metrics:
            raise ValueError(f"running_mean: no metric {metric!r}; there are {sorted(metrics)}.")
        part = as_means(metrics)[metric]
        if isinstance(part, Terms):
            part = Mean(part.value * part.weight, part.weight)
        return tuple(x.astype(jnp.float32) for x in with_mean(*entry, part))

    return Book(
        start=lambda params: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)),
        give=lambda entry, params, batch: {column: entry},
        update=update,
    )


def start_books(books: Books | None, params: Any, carry: Any = None) -> Any:
    """Returns the first carry of a run: the given one plus an entry for each book.

    Raises:
        ValueError: if there are books and `carry` is not a dict, or has an entry with a book's name.
    """
    if not books:
        return carry
    carry = {} if carry is None else carry
    if not isinstance(carry, Mapping) or books.keys() & carry.keys():
        has = sorted(carry) if isinstance(carry, Mapping) else type(carry).__name__
        raise ValueError(
            f"init_state: the carry must be a dict without the names of books {sorted(books)}, got {has}."
        )
    return dict(carry) | {name: book.start(params) for name, book in books.items()}


def give(books: Books, carry: Any, params: Any, batch: Any, microbatches: int) -> Any:
    """Adds the books' columns to the batch.

    Raises:
        ValueError: if the batch is not a dict or has a column that a book gives, or if the carry lacks an
            entry.
    """
    if not books:
        return batch
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"make_step: books {sorted(books)} add columns to the batch, which must then be a dict of named "
            f"columns, got {type(batch).__name__}."
        )
    missing = sorted(books.keys() - (carry.keys() if isinstance(carry, Mapping) else set()))
    if missing:
        raise ValueError(
            f"make_step: the state's carry has no entries {missing}; make the state with "
            "init_state(..., books=books)."
        )

    def given(batch):
        found = {}
        for name, book in books.items():
            columns = book.give(carry[name], params, batch)
            if taken := sorted(columns.keys() & (batch.keys() | found.keys())):
                raise ValueError(
                    f"make_step: book {name!r} gives {taken}, which the batch already has; leave it out of "
                    "the data, or drop the book."
                )
            found |= columns
        return found

    whole = given(batch)
    if microbatches > 1:  # to use no more memory than the objective's slices
        rows = joined(jax.lax.map(given, split_batch(batch, microbatches)))
        # The parts of `whole` that have rows are not read, so the compiler removes them.
        whole = jax.tree.map(lambda w, r: r if jnp.ndim(w) else w, whole, rows)
    return {**batch, **whole}


def updated(books: Books, carry: Any, trainable: Any, metrics: Any, good: jax.Array) -> Any:
    """Returns the carry after a step, unchanged if the step is not `good`.

    Raises:
        ValueError: if an update changes the structure of its entry, a shape or a dtype.
    """
    if not books:
        return carry
    new = {
        name: where_good(
            good,
            book.update(carry[name], trainable, metrics),
            carry[name],
            f"make_step: the update of book {name!r}",
        )
        for name, book in books.items()
    }
    return {**carry, **new}


def where_good(good: jax.Array, new: Any, old: Any, who: str) -> Any:
    """Returns `new` if `good`, else `old`; both must have the same structure, shapes and dtypes.

    A checkpoint whose structure has changed could not be restored into the state at the start of a run.

    Args:
        who: the function that made `new`, for the start of the error message.

    Raises:
        ValueError: if they differ; it names the first leaf that differs, with its old and new type.
    """
    named = lambda tree: {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    now, before = named(new), named(old)
    for name in [*before, *(now.keys() - before.keys())]:
        if not is_like(now.get(name), before.get(name)):
            raise ValueError(
                f"{who} changes {name or 'the entry'!r} from {type_of(before.get(name))} to "
                f"{type_of(now.get(name))}; it must keep structure, shapes and dtypes: convert the new "
                "value, or start with the type that it will have."
            )
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"{who} changes the structure from {jax.tree.structure(old)} to {jax.tree.structure(new)}; it "
            "must stay as it was at the start."
        )
    # Unchanged leaves are passed through: no copy, and frozen leaves remain inputs only.
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(good, n, o), new, old)


def is_like(new: Any, old: Any) -> bool:
    """Returns whether `new` has the shape and dtype of `old`; a Python number matches any dtype."""
    if new is None or old is None or new is old:
        return new is old
    return jnp.shape(new) == jnp.shape(old) and jnp.result_type(new, old) == jnp.result_type(old)


def type_of(leaf: Any) -> str:
    """Dtype and shape of a leaf, for an error: float32[2, 3]."""
    return "nothing" if leaf is None else f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
