"""Partial connection adaptation: a few rows of a kernel train in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.kernels.paca import chosen_columns
from jaxft.weights.base import Weight, WeightLike, frozen_field, is_weight, to_dense

Selection = Literal["random", "largest_norm", "smallest_norm"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PacaWeight(Weight):
    """W with the rows `indices` replaced by (α/R) P, of which P trains.

    PaCA: Woo et al., 2025, arxiv.org/abs/2503.01905, section 3 (there for columns: it stores W^T).
    No adapter is multiplied, and the backward pass keeps x[..., indices] alone, R numbers a token.

    Two modes, same numbers. In place (the paper's): `base` is an array that holds the tuned rows
    already, so that the product is that of the plain kernel; `committed` writes them after each
    update (jaxft.train does, within the donated step). Whoever moves P otherwise must call
    `committed` before multiplying. Not in place (QPaCA): the rows are put into the dense form of
    `base` in the forward pass and again in the backward pass; no dense kernel is stored between.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    rows: jax.Array  # P [R, F] float32
    indices: jax.Array = frozen_field()  # [R] int32, distinct
    alpha: float = dataclasses.field(default=1.0, metadata={"static": True})
    in_place: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def rank(self) -> int:
        """R."""
        return self.rows.shape[-2]

    def rmatmul(self, x):
        return _product(self.in_place, x, self.base, self._scaled(), self.indices)

    def to_dense(self):
        # Written again even in place, so that P alone decides, and gradients reach it.
        return _with_rows(jax.lax.stop_gradient(to_dense(self.base)), self._scaled(), self.indices)

    def committed(self) -> PacaWeight:
        """The same node with the tuned rows written into `base`, if it works in place."""
        if not self.in_place:
            return self
        rows = jax.lax.stop_gradient(self._scaled())
        return dataclasses.replace(self, base=_with_rows(self.base, rows, self.indices))

    def with_specs(self, spec):
        *stack, _, columns = (*(None,) * (self.ndim - len(spec)), *spec)
        base = self.base.with_specs(spec) if is_weight(self.base) else spec
        rows, indices = PartitionSpec(*stack, None, columns), PartitionSpec(*stack, None)
        return dataclasses.replace(self, base=base, rows=rows, indices=indices)

    def _scaled(self):
        return self.rows * (self.alpha / self.rank)


def paca_weight(
    key: jax.Array,
    kernel: WeightLike,
    *,
    rank: int = 16,
    alpha: float | None = None,
    selection: Selection = "random",
    shards: int = 1,
    in_place: bool | None = None,
    original: WeightLike | None = None,
) -> PacaWeight:
    """A PacaWeight that equals `kernel` [D, F] bit for bit in place.

    Args:
        key: draws the rows under selection="random".
        kernel: the kernel; a quantised one works out of place (QPaCA), its rows dequantised.
        rank: R, how many rows train.
        alpha: α/R multiplies what an update of P does to W, as a learning rate would; None: R.
        selection: which rows: random (the paper's), or those of largest or smallest L2 norm.
        shards: draw R/shards rows from each of so many equal parts of D: for a kernel sharded on D.
        in_place: None: where `kernel` is an array.
        original: where the tuned rows start, the kernel before it was quantised, so that they carry no
            rounding error; norms are its too. None: `kernel` itself, as in the authors' code.

    Raises:
        ValueError: for a kernel that is no matrix, a rank outside 1..D, an unknown selection, an
            original of another shape or beside an array, or shards that do not divide D and the rank.
    """
    if len(kernel.shape) != 2:
        raise ValueError(f"paca: needs a matrix [in, out], got a weight of shape {kernel.shape}.")
    size = kernel.shape[0]
    if not 1 <= rank <= size:
        raise ValueError(
            f"paca: rank must lie in 1..{size} for a kernel {kernel.shape}, got {rank}."
        )
    if size % shards or rank % shards:
        raise ValueError(
            f"paca: shards={shards} must divide the {size} inputs of the kernel and rank {rank}."
        )
    if is_weight(kernel) and in_place:
        raise ValueError("paca: a structured base cannot be written in place; leave in_place=None.")
    if original is not None and (original.shape != kernel.shape or not is_weight(kernel)):
        raise ValueError(
            f"paca: original is for a quantised kernel and has its shape, got {original.shape} for "
            f"{type(kernel).__name__} {kernel.shape}; leave it out."
        )
    dense = to_dense(kernel if original is None else original)
    scores = _scores(key, dense, selection).reshape(shards, size // shards)
    local = jax.lax.top_k(scores, rank // shards)[1] + jnp.arange(shards)[:, None] * (
        size // shards
    )
    indices = jnp.sort(local.reshape(-1)).astype(jnp.int32)
    alpha = float(rank if alpha is None else alpha)
    rows = dense[indices].astype(jnp.float32) / (alpha / rank)
    return PacaWeight(
        kernel, rows, indices, alpha, not is_weight(kernel) if in_place is None else in_place
    )


def delta(weight: PacaWeight) -> tuple[jax.Array, jax.Array]:
    """(indices [R], rows [R, F] of the effective kernel): all that differs from the base model."""
    return weight.indices, weight._scaled()


def check_paca(weight: PacaWeight, name: str = "paca") -> None:
    """Raises if a weight, with stacked layers or without, cannot be right; reads its arrays.

    For weights that were not made by `paca_weight`, and to find out who moved P and did not commit.

    Raises:
        ValueError: naming the weight, for rows or indices of the wrong shape, indices that repeat or
            lie outside the kernel, and a base that does not hold the tuned rows though it should.
    """
    *stack, size, features = weight.shape
    rows, indices = weight.rows.shape, weight.indices.shape
    if rows != (*stack, rows[-2], features) or indices != rows[:-1]:
        raise ValueError(
            f"{name}: a kernel {weight.shape} needs rows [..., R, {features}] and indices [..., R], got "
            f"{rows} and {indices}."
        )
    # On the devices: the arrays may span hosts.
    chosen = jnp.asarray(weight.indices)
    lowest, highest = int(chosen.min()), int(chosen.max())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name}: indices must lie in 0..{size - 1}, got {lowest}..{highest}.")
    if jnp.any(jnp.diff(jnp.sort(chosen, axis=-1), axis=-1) == 0):
        raise ValueError(f"{name}: indices repeat; each row of the kernel may train once.")
    if not weight.in_place:
        return
    held = jnp.take_along_axis(jnp.asarray(weight.base), chosen[..., None], axis=-2)
    if not jnp.array_equal(held, weight._scaled().astype(weight.dtype)):
        raise ValueError(
            f"{name}: the kernel does not hold the tuned rows; call jaxft.train.commit(params) where "
            "they are moved."
        )


def _scores(key, dense, selection):
    if selection == "random":
        return jax.random.uniform(key, dense.shape[:1])
    norms = jnp.linalg.norm(dense.astype(jnp.float32), axis=1)
    if selection == "largest_norm":
        return norms
    if selection == "smallest_norm":
        return -norms
    raise ValueError(
        f"paca: unknown selection {selection!r}; expected random, largest_norm or smallest_norm."
    )


def _with_rows(dense, rows, indices):
    return dense.at[indices].set(rows.astype(dense.dtype), unique_indices=True)


def _effective(in_place, base, rows, indices, dtype):
    if in_place:
        return base.astype(dtype)
    return _with_rows(to_dense(base), rows, indices).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(in_place, x, base, rows, indices):
    """x W; `rows` is in place only the port through which their gradient leaves."""
    return x @ _effective(in_place, base, rows, indices, x.dtype)


def _product_forward(in_place, x, base, rows, indices):
    y = _product(in_place, x, base, rows, indices)
    # base and indices are inputs of the step: keeping them costs nothing. Scaled rows are not, and in
    # place nothing but their data type is asked for.
    return y, (chosen_columns(x, indices), base, rows[:0] if in_place else rows, indices)


def _product_backward(in_place, residuals, g):
    chosen, base, rows, indices = residuals
    kernel = _effective(in_place, base, rows, indices, g.dtype)
    dx = jax.lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    tokens = tuple(range(g.ndim - 1))
    drows = jax.lax.dot_general(
        chosen, g, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32
    )
    return dx, None, drows.astype(rows.dtype), None


_product.defvjp(_product_forward, _product_backward)
