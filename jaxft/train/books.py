"""Books: entries of the carry that a step keeps and its objective reads: moving references, running means."""

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
    """Three pure functions of one entry of the carry, which the step of `make_step` calls.

    start(params) -> entry: at the beginning of the run, of the whole params tree.
    give(entry, params, batch) -> {column: value}: what the objective finds in its batch beside the data. The
        compiled step makes it once, from the whole params of the state, and without a gradient. A value is
        a scalar, or a column of rows [B, ...] each made from its own row (with microbatches slice by slice).
    update(entry, trainable, metrics) -> entry: after the step, from the trainable part of the new params and
        the metrics of the step. After a step that is not `good` the entry stays as it was.
    """

    start: Callable[[Any], Entry]
    give: Callable[[Entry, Any, Any], Mapping[str, Any]]
    update: Callable[[Entry, Any, Mapping[str, Any]], Entry]


Books = Mapping[str, Book]


def running_mean(metric: str, *, column: str = "running") -> Book:
    """The mean of a metric over all steps so far.

    The batch gets `column`, (mean, weight), two float32 scalars. The mean is weighted as the metric's `Mean`s
    are; a plain number counts like the loss.

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
    """The first carry of a run: the given one, with an entry for each book.

    Raises:
        ValueError: if there are books and `carry` is no dict, or has an entry of a book's name.
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
    """The batch with what the books give.

    Raises:
        ValueError: if the batch is no dict, the carry lacks an entry, or the batch has a column that a book
            gives.
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
                    f"make_step: book {name!r} gives {taken}, which the batch has already; leave it out of "
                    "the data, or drop the book."
                )
            found |= columns
        return found

    whole = given(batch)
    if microbatches > 1:  # as little memory as the slices of the objective take
        rows = joined(jax.lax.map(given, split_batch(batch, microbatches)))
        # What of `whole` has rows is not read, so the compiler leaves it out.
        whole = jax.tree.map(lambda w, r: r if jnp.ndim(w) else w, whole, rows)
    return {**batch, **whole}


def updated(books: Books, carry: Any, trainable: Any, metrics: Any, good: jax.Array) -> Any:
    """The carry after a step; if that is not `good`, as it was.

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
    """The tree `new` if `good`, else `old`, of the same structure, shapes and dtypes.

    A checkpoint of a state that changed them could not be restored into the state at the start of a run.

    Args:
        who: who made `new`, at the beginning of the error.

    Raises:
        ValueError: if they differ; it names the first leaf that does, with its old and new type.
    """
    named = lambda tree: {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    now, before = named(new), named(old)
    for name in [*before, *(now.keys() - before.keys())]:
        if not is_like(now.get(name), before.get(name)):
            raise ValueError(
                f"{who} changes {name or 'the entry'!r} from {type_of(before.get(name))} to "
                f"{type_of(now.get(name))}; it must keep structure, shapes and dtypes: convert what is new, "
                "or start with the type that it will have."
            )
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"{who} changes the structure from {jax.tree.structure(old)} to {jax.tree.structure(new)}; it "
            "must stay as it was at the start."
        )
    # What nobody touched goes through as it is: no copy, and frozen leaves stay inputs alone.
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(good, n, o), new, old)


def is_like(new: Any, old: Any) -> bool:
    """Whether `new` has the shape of `old` and, a Python number taking the dtype it meets, the dtype."""
    if new is None or old is None or new is old:
        return new is old
    return jnp.shape(new) == jnp.shape(old) and jnp.result_type(new, old) == jnp.result_type(old)


def type_of(leaf: Any) -> str:
    """Dtype and shape of a leaf, for an error: float32[2, 3]."""
    return "nothing" if leaf is None else f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
