"""Checks whether an objective uses weights in their in-place form unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxft.adapters.committing import is_in_place
from jaxft.weights import is_weight
from jaxft.weights.paca import IN_PLACE

# Operations that take a layer out of a stack, or pass an array on.
_PASSING = frozenset(
    "squeeze slice dynamic_slice gather reshape broadcast_in_dim transpose copy name device_put reshard "
    "sharding_constraint optimization_barrier pvary pcast".split()
)
Owners = Sequence[int | None]  # for each variable, the weight whose unchanged field it is, or None


def untouched(objective: Callable[..., Any], params: Any, *args: Any) -> bool:
    """True if each product of an in-place weight in objective(params, *args) reads its fields as given.

    The in-place form is correct while the frozen kernel holds the trained rows. Noise that
    jax.tree.map adds to all params, or an inner step on them, changes only the rows, or changes the
    kernel differently. The objective is traced, not run. Fields that reach a product through a
    loop's carry, or through an operation that does more than select a layer, count as touched: at
    worst a step is slower than necessary.

    Args:
        params: the result of `in_place`.
    """
    jaxpr = jax.make_jaxpr(objective)(params, *args).jaxpr
    owners: list[int | None] = []
    for i, node in enumerate(jax.tree.leaves(params, is_leaf=is_weight)):
        owners += [i if is_in_place(node) else None] * len(jax.tree.leaves(node))
    return _visit(jaxpr, [*owners, *[None] * (len(jaxpr.invars) - len(owners))]) is not None


def _visit(jaxpr: Jaxpr, owners: Owners) -> Owners | None:
    """The owners of the jaxpr's results; None if a product in it gets an array that no weight owns."""
    known = dict(zip(jaxpr.invars, owners, strict=True))
    of = lambda variable: None if isinstance(variable, Literal) else known.get(variable)
    for eqn in jaxpr.eqns:
        given = [of(variable) for variable in eqn.invars]
        found = [None] * len(eqn.outvars)
        if _is_product(eqn):
            fields = set(given[eqn.params["num_consts"] + 1 :])  # after the activations
            if len(fields) != 1 or None in fields:
                return None
        else:
            if _is_mark(eqn) and given[0] is None:
                return None
            if eqn.primitive.name in _PASSING:
                found = given[: len(found)]
            for inner, inputs, passes in _inner(eqn, given):
                results = _visit(inner, inputs)
                if results is None:
                    return None
                found = results if passes else found
        known.update(zip(eqn.outvars, found, strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _inner(eqn: Any, given: Owners) -> Iterator[tuple[Jaxpr, Owners, bool]]:
    """(jaxpr, owners of its arguments, whether its results are the equation's) of each inner jaxpr."""
    params, nothing = eqn.params, lambda jaxpr, n: [None] * (len(jaxpr.invars) - n)
    match eqn.primitive.name:
        case "scan":
            first, carry = params["num_consts"], params["num_carry"]
            yield (
                params["jaxpr"].jaxpr,
                [*given[:first], *[None] * carry, *given[first + carry :]],
                False,
            )
        case "while":
            first = params["cond_nconsts"]
            parts = {
                "cond": given[:first],
                "body": given[first : first + params["body_nconsts"]],
            }
            for name, consts in parts.items():
                jaxpr = params[f"{name}_jaxpr"].jaxpr
                yield jaxpr, [*consts, *nothing(jaxpr, len(consts))], False
        case "cond":
            for branch in params["branches"]:
                yield branch.jaxpr, given[1:], False
        case _:
            for value in params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                    if not isinstance(jaxpr, Jaxpr):
                        continue
                    same = len(jaxpr.invars) == len(given)
                    passes = same and len(jaxpr.outvars) == len(eqn.outvars)
                    yield jaxpr, given if same else nothing(jaxpr, 0), passes


def _is_mark(eqn):
    return eqn.primitive.name == "name" and eqn.params["name"] == IN_PLACE


def _is_product(eqn):
    """True if the equation is a product of an in-place weight, with activations and fields as arguments."""
    found = eqn.params.get("call_jaxpr")
    if eqn.primitive.name != "custom_jvp_call" or found is None:
        return False
    return any(map(_is_mark, found.jaxpr.eqns))
