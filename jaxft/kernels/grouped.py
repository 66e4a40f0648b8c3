"""Grouped matrix products: rows sorted by group, each group with its own matrix; nothing is dropped."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxft.kernels.backend import target_platform
from jaxft.kernels.pullback import linear_map

_LARGEST_BLOCK = 256


def grouped_matmul_reference(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by one dense product of all rows for each group."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(x))[None]
    mine = (row >= (ends - sizes)[:, None]) & (row < ends[:, None])  # [E, N]
    return jnp.einsum("en,nd,edf->nf", mine.astype(x.dtype), x, w)


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """y [N, F] with y[n] = x[n] w[e] for each row n of group e; rows after the last group are 0.

    The work is that of the rows, whatever the sizes. On TPUs and GPUs it is `jax.lax.ragged_dot`. On CPUs
    XLA makes that one dense product of all rows for each group, so there rows are multiplied in blocks,
    each of which belongs to one group: at most E blocks are partly filled.

    Args:
        x: [N, D], the rows of group 0 first, then those of group 1, and so on.
        w: [E, D, F].
        sizes: [E] int32, the numbers of rows; their sum is at most N.
    """
    if target_platform() != "cpu":
        return jax.lax.ragged_dot(x, w, sizes)
    return _product(False, x, w, sizes)


def grouped_matmul_transposed(y: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [N, D] with x[n] = y[n] w[e]^T: a product with transposed kernels, which are not copied."""
    if target_platform() != "cpu":
        return jax.lax.ragged_dot(y, jnp.swapaxes(w, 1, 2), sizes)
    return _product(True, y, w, sizes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(transposed, x, w, sizes):
    """Rows of group e times w[e], or times its transpose."""
    rows, width = x.shape[0], w.shape[1 if transposed else 2]
    large, small = _blocks(rows, len(sizes))
    # A block may reach beyond its group; the next group's blocks come later and overwrite that part.
    padded = jnp.pad(x, ((0, small), (0, 0)))
    contracted = ((1,), (1 if transposed else 0,))

    def group(e, start, out):
        kernel = jax.lax.dynamic_index_in_dim(w, e, keepdims=False)  # one copy for all its blocks

        def multiply(size, at, out):
            part = jax.lax.dynamic_slice_in_dim(padded, at, size)
            made = jax.lax.dot_general(part, kernel, (contracted, ((), ())))
            return jax.lax.dynamic_update_slice_in_dim(out, made, at, 0)

        return _each_block(multiply, large, small, start, sizes[e], out)

    empty = _varying(jnp.zeros((rows + small, width), x.dtype), x, w, sizes)
    out = _each_group(group, sizes, empty)
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes), out[:rows], 0)


def _product_jvp(transposed, primals, tangents):
    (x, w, sizes), (dx, dw, _) = primals, tangents
    y, parts = _product(transposed, x, w, sizes), []
    if not isinstance(dx, SymbolicZero):
        apply = lambda fixed, moving: _product(transposed, moving[0], *fixed)
        transpose = lambda fixed, ct: [_product(not transposed, ct, *fixed)]
        parts.append(linear_map(apply, transpose, [w, sizes], [dx]))
    if not isinstance(dw, SymbolicZero):
        apply = lambda fixed, moving: _product(transposed, fixed[0], moving[0], fixed[1])
        transpose = lambda fixed, ct: [_outer(*_sides(transposed, fixed[0], ct), fixed[1])]
        parts.append(linear_map(apply, transpose, [x, sizes], [dw]))
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _sides(transposed, x, ct):
    return (ct, x) if transposed else (x, ct)


@jax.custom_jvp
def _outer(x, y, sizes):
    """[E, D, F]: the sum of x[n]^T y[n] over the rows n of each group; x is [N, D] and y [N, F]."""
    large, small = _blocks(x.shape[0], len(sizes))
    pad = lambda part: jnp.pad(part, ((0, small), (0, 0)))
    x, y = pad(x), pad(y)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    empty = _varying(jnp.zeros((x.shape[1], y.shape[1]), wide), x, y, sizes)

    def group(e, start, out):
        end = start + sizes[e]

        def add(size, at, total):
            left = jax.lax.dynamic_slice_in_dim(x, at, size)
            left = jnp.where(at + jnp.arange(size)[:, None] < end, left, 0)
            right = jax.lax.dynamic_slice_in_dim(y, at, size)
            return total + jax.lax.dot_general(
                left, right, (((0,), (0,)), ((), ())), preferred_element_type=wide
            )

        total = _each_block(add, large, small, start, sizes[e], empty)
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, 0)

    shape = (len(sizes), *empty.shape)
    return _each_group(group, sizes, _varying(jnp.zeros(shape, x.dtype), x, y, sizes))


def _outer_jvp(primals, tangents):
    (x, y, sizes), (dx, dy, _) = primals, tangents
    out, parts = _outer(x, y, sizes), []
    if not isinstance(dx, SymbolicZero):
        apply = lambda fixed, moving: _outer(moving[0], *fixed)
        transpose = lambda fixed, ct: [_product(True, fixed[0], ct, fixed[1])]
        parts.append(linear_map(apply, transpose, [y, sizes], [dx]))
    if not isinstance(dy, SymbolicZero):
        apply = lambda fixed, moving: _outer(fixed[0], moving[0], fixed[1])
        transpose = lambda fixed, ct: [_product(False, fixed[0], ct, fixed[1])]
        parts.append(linear_map(apply, transpose, [x, sizes], [dy]))
    return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)


_outer.defjvp(_outer_jvp, symbolic_zeros=True)


def _blocks(rows, groups):
    """(rows of a large block, rows of a small one): a mean group is one large block, rests are small ones."""
    mean = max(1, rows // groups)
    large = min(_LARGEST_BLOCK, max(8, 1 << (mean.bit_length() - 1)))
    return large, max(8, large // 4)


def _each_group(apply, sizes, out):
    """Folds apply(group, its first row, out) over the groups that have rows, in their order."""
    starts = jnp.cumsum(sizes) - sizes
    filled = jnp.argsort(sizes == 0, stable=True)
    step = lambda i, out: apply(filled[i], starts[filled[i]], out)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), step, out)


def _each_block(apply, large, small, start, size, out):
    """Folds apply(rows of a block, its first row, out) over blocks that cover `size` rows from `start`."""
    whole = size // large if large > small else 0
    rest = start + whole * large
    if large > small:
        out = jax.lax.fori_loop(0, whole, lambda i, out: apply(large, start + i * large, out), out)
    blocks = -(-(size - whole * large) // small)
    return jax.lax.fori_loop(0, blocks, lambda i, out: apply(small, rest + i * small, out), out)


def _varying(empty, *others):
    """`empty`, marked as varying over the shard_map axes over which any of `others` varies."""
    axes = [getattr(jax.typeof(x), "mat", None) for x in others]
    names = frozenset().union(*(a.varying for a in axes if a is not None))
    return jax.lax.pcast(empty, tuple(names), to="varying") if names else empty
