"""Fast gradients for functions that JAX can still differentiate in both modes, any number of times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Wanted = tuple[bool, ...]  # for each argument, whether it is differentiated


def with_pullback(
    plain: Callable[..., jax.Array],
    forward: Callable[..., tuple[jax.Array, Any]],
    pullback: Callable[..., tuple[jax.Array, ...]],
) -> Callable[..., jax.Array]:
    """plain(*args), computed by `forward` and `pullback` at first order and by `plain` otherwise.

    `jax.custom_vjp` does the same for reverse mode but refuses `jax.jvp` and second derivatives.
    Here `plain` provides them: tangents, Hessian products and gradients of gradients.

    Args:
        plain: maps arrays to one array; JAX must be able to differentiate it. It never runs in a
            first-order gradient.
        forward: (wanted, *args) -> (the value of plain, residuals of any structure).
        pullback: (wanted, args, residuals, cotangent) -> the cotangents of only the wanted
            arguments, each with its argument's shape and data type.
    """

    @jax.custom_jvp
    def value(*args):
        return forward((False,) * len(args), *args)[0]

    def value_jvp(args, tangents):
        wanted = tuple(not isinstance(t, SymbolicZero) for t in tangents)
        args = tuple(as_varying(args))  # like the tangents made below: their types must agree
        y, residuals = differentiated(wanted, *args)
        if not any(wanted):
            return y, jnp.zeros_like(y)
        leaves, structure = jax.tree.flatten((args, residuals))

        def apply(fixed, moving):
            args = structure.unflatten(fixed)[0]
            return jax.jvp(of_wanted(plain, wanted, args), pick(wanted, args), moving)[1]

        transpose = lambda fixed, ct: pulled(wanted, *structure.unflatten(fixed), ct)
        return y, linear_map(apply, transpose, leaves, pick(wanted, tangents))

    value.defjvp(value_jvp, symbolic_zeros=True)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def differentiated(wanted, *args):
        return forward(wanted, *args)

    @differentiated.defjvp
    def differentiated_jvp(wanted, args, tangents):
        y, residuals = differentiated(wanted, *args)
        dy = jax.jvp(plain, args, tangents)[1]
        # Only `pulled` uses residuals, and its derivatives do not depend on them.
        return (y, residuals), (dy, jax.tree.map(_zero_tangent, residuals))

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def pulled(wanted, args, residuals, ct):
        return tuple(pullback(wanted, args, residuals, ct))

    @pulled.defjvp
    def pulled_jvp(wanted, primals, tangents):
        def slow(args, ct):
            return jax.vjp(of_wanted(plain, wanted, args), *pick(wanted, args))[1](ct)

        args, _, ct = primals
        dy = jax.jvp(slow, (args, ct), (tangents[0], tangents[2]))[1]
        return pulled(wanted, *primals), dy

    return value


def pick(wanted: Wanted, values: Sequence) -> tuple:
    """The wanted ones of `values`."""
    return tuple(v for v, w in zip(values, wanted, strict=True) if w)


def of_wanted(function: Callable, wanted: Wanted, args: Sequence) -> Callable:
    """`function` as a function of only the wanted arguments; the others are those of `args`."""

    def of_wanted(*moving):
        moving = iter(moving)
        return function(*(next(moving) if w else a for a, w in zip(args, wanted, strict=True)))

    return of_wanted


def linear_map(
    apply: Callable[[Sequence, Sequence], jax.Array],
    transpose: Callable[[Sequence, jax.Array], Sequence],
    fixed: Sequence[jax.Array],
    moving: Sequence[jax.Array],
) -> jax.Array:
    """apply(fixed, moving), linear in `moving`, whose transposed map JAX takes from `transpose`.

    `transpose(fixed, cotangent)` gives the cotangents of `moving`. Reverse mode runs `transpose`,
    not `apply`: a backward pass keeps only `fixed` and computes products in the order written
    there.

    `jax.custom_derivatives.linear_call` does the same, but has no derivative with respect to
    `fixed` and no batching.
    """
    moving = as_varying([*fixed, *moving])[len(fixed) :]
    return _linear_p.bind(*fixed, *moving, apply=apply, transpose=transpose, split=len(fixed))


def as_varying(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """The operands, all marked as varying over the shard_map axes over which any of them varies.

    JAX's own operations do so by themselves: the cotangent of an operand that is the same on all
    devices is summed.
    """
    axes = [getattr(jax.typeof(x), "mat", None) for x in operands]
    axes = [frozenset() if a is None else a.varying for a in axes]
    lacking = [tuple(frozenset().union(*axes) - own) for own in axes]
    cast = functools.partial(jax.lax.pcast, to="varying")
    return [cast(x, names) if names else x for x, names in zip(operands, lacking, strict=True)]


def _linear_value(*operands, apply, transpose, split):
    return apply(operands[:split], operands[split:])


def _linear_jvp(operands, tangents, **params):
    moves = tuple(type(t) is not ad.Zero for t in tangents)
    value = of_wanted(functools.partial(_linear_value, **params), moves, operands)
    dy = jax.jvp(value, pick(moves, operands), pick(moves, tangents))[1]
    return _linear_p.bind(*operands, **params), dy


def _linear_transpose(ct, *operands, apply, transpose, split):
    return [None] * split + list(transpose(operands[:split], ct))


def _linear_batch(operands, dims, *, apply, transpose, split):
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    fixed, axes = operands[:split], (tuple(dims[:split]), 0)
    moving = [
        batching.bdim_at_front(x, d, size)
        for x, d in zip(operands[split:], dims[split:], strict=True)
    ]
    return linear_map(jax.vmap(apply, axes), jax.vmap(transpose, axes), fixed, moving), 0


_linear_p = Primitive("linear_with_transpose")
_linear_p.def_impl(_linear_value)
_linear_p.def_abstract_eval(
    lambda *avals, **params: jax.make_jaxpr(functools.partial(_linear_value, **params))(
        *avals
    ).out_avals[0]
)
mlir.register_lowering(_linear_p, mlir.lower_fun(_linear_value, multiple_results=False))
ad.primitive_jvps[_linear_p] = _linear_jvp
ad.primitive_transposes[_linear_p] = _linear_transpose
batching.primitive_batchers[_linear_p] = _linear_batch


def _zero_tangent(x):
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)
