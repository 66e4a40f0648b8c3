"""Partial connection adaptation: a few rows of a kernel train in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jaxft.kernels.paca import chosen_columns
from jaxft.kernels.pullback import linear_map
from jaxft.weights.base import (
    Weight,
    WeightLike,
    frozen_field,
    frozen_grouped,
    grouped,
    is_weight,
    matmul,
    split_spec,
    to_dense,
    wide,
)

IN_PLACE = (
    "jaxft in place"  # name of the kernel in an in-place product: see jaxft.adapters.untouched
)
Selection = Literal["random", "largest_norm", "smallest_norm"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PacaWeight(Weight):
    """W with the rows `indices` replaced by (α/R) P, where P trains.

    PaCA: Woo et al., 2025, arxiv.org/abs/2503.01905, section 3 (there for columns: it stores W^T).
    There is no adapter product, and the backward pass only keeps x[..., indices], R numbers per token.

    The product is correct for any P. Over an array it is x W + x[..., indices] ((α/R) P - W[indices]).
    Over a structured base (QPaCA) the rows are put into its dense form, in the forward pass and
    again in the backward pass; no dense kernel is stored between. `in_place` asserts that an array
    `base` holds the tuned rows (`committed` writes them): the product is then only x W, as in the
    paper. `jaxft.adapters.in_place` sets it only for the objective of a train step.
    """

    base: WeightLike = frozen_field()  # W [D, F]
    rows: jax.Array  # P [R, F] float32
    indices: jax.Array = frozen_field()  # [R] int32, distinct
    alpha: float = dataclasses.field(default=1.0, metadata={"static": True})
    in_place: bool = dataclasses.field(default=False, metadata={"static": True})

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
        scale = self.alpha / self.rank
        return _product(self.in_place, scale, x, self.base, self.rows, self.indices)

    def rgrouped(self, x, sizes):
        if is_weight(self.base):
            return super().rgrouped(x, sizes)
        # Also in place, where the difference is 0, so that gradients reach P: R of D columns more.
        expert = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
        chosen = jnp.take_along_axis(x, self.indices[expert], axis=1)
        held = jnp.take_along_axis(self.base, self.indices[..., None], axis=1)
        wanted = self._scaled().astype(self.dtype)
        moved = wide(wanted) - jax.lax.stop_gradient(wide(held))
        return frozen_grouped(x, self.base, sizes) + grouped(chosen, moved, sizes)

    def to_dense(self):
        # Written even in place, so that the result depends only on P, and gradients reach it.
        return _with_rows(jax.lax.stop_gradient(to_dense(self.base)), self._scaled(), self.indices)

    def committed(self) -> PacaWeight:
        """The same node with the tuned rows written into `base`, if that is an array."""
        if is_weight(self.base):
            return self
        rows = jax.lax.stop_gradient(self._scaled())
        return dataclasses.replace(self, base=_with_rows(self.base, rows, self.indices))

    def with_specs(self, spec):
        stack, _, columns = split_spec(spec, self.ndim)
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
    original: WeightLike | None = None,
) -> PacaWeight:
    """A PacaWeight that equals `kernel` [D, F], bit for bit if that is an array.

    Args:
        key: draws the rows under selection="random".
        kernel: the kernel; the rows of a quantised one (QPaCA) are dequantised.
        rank: R, the number of rows that train.
        alpha: α/R multiplies the effect of an update of P on W, like a learning rate; None: R.
        selection: random rows (the paper's choice), or those of largest or smallest L2 norm.
        shards: number of equal parts of D, with R/shards rows from each; for a kernel sharded on D.
        original: the kernel before quantisation, from which the rows start without rounding error
            and whose norms are used. None: `kernel` itself, as in the authors' code.

    Raises:
        ValueError: for a kernel that is not a matrix, a rank outside 1..D, an unknown selection, an
            original of another shape or for an array, or shards that do not divide D and the rank.
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
    rows = wide(dense[indices]) / (alpha / rank)
    return PacaWeight(kernel, rows, indices, alpha)


def delta(weight: PacaWeight) -> tuple[jax.Array, jax.Array]:
    """(indices [R], rows [R, F] of the effective kernel): the whole difference from the base model."""
    return weight.indices, weight._scaled()


def check_paca(weight: PacaWeight, name: str = "paca") -> None:
    """Raises an error if a weight, with or without stacked layers, is invalid; reads its arrays.

    Use it for weights that were not made by `paca_weight`.

    Raises:
        ValueError: naming the weight, for rows or indices of the wrong shape, and for indices that
            repeat or lie outside the kernel.
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


def _scores(key, dense, selection):
    if selection == "random":
        return jax.random.uniform(key, dense.shape[:1])
    norms = jnp.linalg.norm(wide(dense), axis=1)
    if selection == "largest_norm":
        return norms
    if selection == "smallest_norm":
        return -norms
    raise ValueError(
        f"paca: unknown selection {selection!r}; expected random, largest_norm or smallest_norm."
    )


def _with_rows(dense, rows, indices):
    return dense.at[indices].set(rows.astype(dense.dtype), unique_indices=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(in_place, scale, x, base, rows, indices):
    """x W for the W whose rows `indices` are scale * `rows`; the base is frozen."""
    if is_weight(base):
        return x @ _with_rows(to_dense(base), rows * scale, indices).astype(x.dtype)
    if in_place:
        # The name marks the product in a jaxpr, and adds no operation.
        return matmul(x, checkpoint_name(base, IN_PLACE))
    # Rounded as in `to_dense`: if the base holds the rows, the difference is exactly 0.
    wanted = wide((rows * scale).astype(base.dtype))
    moved = wanted - wide(base[indices])
    return matmul(x, base) + chosen_columns(x, indices) @ moved.astype(x.dtype)


def _product_jvp(in_place, scale, primals, tangents):
    x, base, rows, indices = primals
    dx, _, drows, _ = tangents
    here = functools.partial(_product, in_place, scale)
    y = here(*primals)
    parts = []
    # The backward pass keeps x[..., indices] and, due to the checkpoint, the weight's own fields, which are
    # inputs of the step and need no memory; it keeps no dense, cast or scaled copy.
    if not isinstance(dx, SymbolicZero):
        parts.append(jax.checkpoint(here, prevent_cse=False)(dx, base, rows, indices))
    if not isinstance(drows, SymbolicZero):
        parts.append(_by_rows(scale, chosen_columns(x, indices), drows))
    # The sum does not start from a zero array, because the backward pass would keep it.
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _by_rows(scale, chosen, drows):
    """chosen [..., R] @ scale * drows [R, F], with a backward product that is accumulated in float32.

    JAX's own backward product would use the cotangent's transpose, [F, tokens] times [tokens, R]: on a CPU
    it copies the cotangent for each kernel, and it rounds to its data type.
    """

    def apply(fixed, moving):
        return fixed[0] @ (moving[0] * scale).astype(fixed[0].dtype)

    def transpose(fixed, cotangent):
        tokens = tuple(range(cotangent.ndim - 1))
        summed = jax.lax.dot_general(
            fixed[0],
            cotangent,
            ((tokens, tokens), ((), ())),
            preferred_element_type=jnp.promote_types(cotangent.dtype, jnp.float32),
        )
        return [(summed * scale).astype(drows.dtype)]

    return linear_map(apply, transpose, [chosen], [drows])
