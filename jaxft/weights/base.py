"""Structured weights: pytrees in the place of a model's kernel array, and functions that read them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jaxft.kernels.backend import target_platform
from jaxft.kernels.grouped import grouped_matmul, grouped_matmul_transposed
from jaxft.kernels.pullback import linear_map


class Weight:
    """A kernel that is not an array: a frozen dataclass registered as a pytree.

    A subclass is final. It represents a dense kernel W [in, out] and defines `shape`, `dtype`,
    `rmatmul(x)` = x W, `to_dense()` = W and `with_specs(spec)`. Its array fields train unless they
    are declared by `frozen_field()`. Methods get one kernel; if layers (or experts) are stacked,
    every field has their leading axes, `stack` gives their sizes, and `jax.lax.scan` or `jax.vmap`
    removes them before a method is called; only `shape`, `dtype`, `stack`, `with_specs` and, for experts,
    `rgrouped` may be used on a stacked weight.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel, with the leading axes of stacked layers."""
        raise NotImplementedError

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the dense kernel."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the dense kernel."""
        return len(self.shape)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes of stacked layers, before the kernel [in, out]."""
        return self.shape[:-2]

    def rmatmul(self, x: jax.Array) -> jax.Array:
        """x W for x [..., in], computed and returned in x's data type."""
        raise NotImplementedError

    def to_dense(self) -> jax.Array:
        """The dense kernel W."""
        raise NotImplementedError

    def rconv(self, x: jax.Array, convolve: Convolution) -> jax.Array:
        """convolve(x, W), which is linear in W, for a convolution's W [window x in, out].

        A weight with a cheaper form than the dense one overrides this. The dense kernel is
        formed again in the backward pass, never kept.
        """
        return jax.checkpoint(lambda x, w: convolve(x, w.to_dense()))(x, self)

    def rgrouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """grouped(x, W, sizes) of a weight with one stacked axis, the experts.

        A weight with a cheaper form than the dense one overrides this. The dense kernels are
        formed again in the backward pass, never kept.
        """
        return jax.checkpoint(_grouped_dense, prevent_cse=False)(x, self, sizes)

    def scaled_bias(self, bias: jax.Array) -> jax.Array:
        """The term added to x W for the `bias` [..., out] of the layer: the bias, except under (IA)^3."""
        return scaled_bias(bias, getattr(self, "base", None))

    def with_specs(self, spec: PartitionSpec) -> Weight:
        """The same node with a PartitionSpec for each field, given that of the dense kernel.

        As for arrays, `spec` applies to the leading axes of `shape`, stacked layers first; axes beyond its
        length are not split.
        """
        raise NotImplementedError


WeightLike: TypeAlias = jax.Array | Weight
# (x, kernel [window x in, any number of columns]) -> x convolved with each column.
Convolution: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def frozen_field(**options: Any) -> Any:
    """A dataclass field that never trains: a base kernel, indices, quantised blocks."""
    return dataclasses.field(metadata={"frozen": True}, **options)


def is_weight(node: Any) -> bool:
    """Returns whether `node` is a structured weight; use it as `is_leaf` of tree functions."""
    return isinstance(node, Weight)


def matmul(x: jax.Array, w: WeightLike) -> jax.Array:
    """x w for x [..., in] and a kernel [in, out], in x's data type."""
    return w.rmatmul(x) if isinstance(w, Weight) else _product(x, w.astype(x.dtype))


def _product(x, w):
    if x.ndim < 3 or w.ndim != 2 or target_platform() != "cpu":
        return x @ w
    # With several leading axes XLA:CPU writes the gradient of w transposed and copies it: 12 % of a
    # full layer's time, 15 % with LoRA. Accelerators choose layouts themselves.
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def grouped(x: jax.Array, w: WeightLike, sizes: jax.Array) -> jax.Array:
    """y [N, F] with y[n] = x[n] w[e] for each row n of expert e, in x's data type; rows after the last are 0.

    Args:
        x: [N, D], the rows of expert 0 first, then those of expert 1, and so on.
        w: kernels [E, D, F], or a weight of that shape.
        sizes: [E] int32, rows of each expert, of which there may be fewer than N.
    """
    if isinstance(w, Weight):
        return w.rgrouped(x, sizes)
    return grouped_matmul(x, w.astype(x.dtype), sizes)


def _grouped_dense(x, w, sizes):
    return grouped_matmul(x, _dense_experts(w).astype(x.dtype), sizes)


def _dense_experts(w):
    """The kernels [E, D, F] of a weight with one stacked axis, or of an array, as one array."""
    return jax.vmap(to_dense)(w) if is_weight(w) else w


@jax.custom_jvp
def frozen_grouped(x: jax.Array, w: WeightLike, sizes: jax.Array) -> jax.Array:
    """`grouped` for frozen kernels: the backward pass keeps w as stored, and does not keep x."""
    return grouped(x, w, sizes)


def _frozen_grouped_jvp(primals, tangents):
    (x, w, sizes), dx = primals, tangents[0]
    y = frozen_grouped(x, w, sizes)
    if isinstance(dx, SymbolicZero):
        return y, jnp.zeros_like(y)
    leaves, structure = jax.tree.flatten((jax.lax.stop_gradient(w), sizes))

    # XLA cannot transpose loops; both directions form the dense kernels anew.
    def apply(fixed, moving):
        return _grouped_dense(moving[0], *structure.unflatten(fixed))

    def transpose(fixed, ct):
        w, sizes = structure.unflatten(fixed)
        return [grouped_matmul_transposed(ct, _dense_experts(w).astype(ct.dtype), sizes)]

    return y, linear_map(apply, transpose, leaves, [dx])


frozen_grouped.defjvp(_frozen_grouped_jvp, symbolic_zeros=True)


def wide(x: jax.Array, *others: jax.Array) -> jax.Array:
    """x in float32, or in the widest type of x and `others`, so that float64 kernels keep their precision."""
    return x.astype(jnp.result_type(jnp.float32, x.dtype, *(other.dtype for other in others)))


def scaled_bias(bias: jax.Array, w: WeightLike | None) -> jax.Array:
    """The term added to x w for the `bias` [..., out] of its layer, with layers stacked or separate."""
    return w.scaled_bias(bias) if isinstance(w, Weight) else bias


def linear_in_x(product):
    """product(x, w) = x w, differentiable only in x, any number of times and in either mode.

    The tangent is dx W with the dense W, which JAX can transpose for any kernel that `product` runs. Due to
    the checkpoint, the backward pass keeps w as stored, without a dense or cast copy, and does not keep x.
    """
    wrapped = jax.custom_jvp(product)
    dense = lambda dx, w: matmul(dx, jax.lax.stop_gradient(to_dense(w)))

    def jvp(primals, tangents):
        (x, w), dx = primals, tangents[0]
        y = wrapped(x, w)
        if isinstance(dx, SymbolicZero):
            return y, jnp.zeros_like(y)
        return y, jax.checkpoint(dense, prevent_cse=False)(dx, w)

    wrapped.defjvp(jvp, symbolic_zeros=True)
    return wrapped


def matmul_float32(x: jax.Array, w: WeightLike) -> jax.Array:
    """x w, accumulated and returned in float32: logits. A dense w is not copied in float32."""
    array, transposed = stored(w)
    if array is None:
        return matmul(x.astype(jnp.float32), w)
    return _float32_product(x, array.astype(x.dtype), transposed)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _float32_product(x, w, transposed):
    return _dot(x, w, transposed, preferred_element_type=jnp.float32)


def _float32_product_jvp(transposed, primals, tangents):
    """Tangents in x's data type; a float32 cotangent would make the backward products float32 too."""
    (x, w), (dx, dw) = primals, tangents
    product = lambda x, w: _dot(x, w, transposed).astype(jnp.float32)
    y = _float32_product(x, w, transposed)
    # A head that does not train gets no product, and no gradient of its size.
    parts = [] if isinstance(dx, SymbolicZero) else [product(dx, w)]
    parts += [] if isinstance(dw, SymbolicZero) else [product(x, dw)]
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


_float32_product.defjvp(_float32_product_jvp, symbolic_zeros=True)


def _dot(x, w, transposed, **options):
    """x w, or x w^T, over the last axis of x."""
    across = ((x.ndim - 1,), (1 if transposed else 0,))
    return jax.lax.dot_general(x, w, (across, ((), ())), **options)


def stored(w: WeightLike) -> tuple[jax.Array | None, bool]:
    """(array or None, whether it is stored [out, in]): the weight, if it is dense underneath."""
    if isinstance(w, Frozen):
        array, transposed = stored(w.value)
        return jax.lax.stop_gradient(array), transposed
    if isinstance(w, Transposed):
        array, transposed = stored(w.weight)
        return array, not transposed
    return (None if is_weight(w) else w), False


@linear_in_x
def frozen_matmul(x: jax.Array, w: WeightLike) -> jax.Array:
    """x w for a frozen kernel: the backward pass keeps w as stored, and does not keep x.

    The product of x and `stop_gradient(w)` has the same gradient, but under a scan over layers JAX
    keeps the stopped (or cast) copy of each layer's kernel, a second base model.
    """
    return matmul(x, w)


def take(w: WeightLike, indices: jax.Array) -> jax.Array:
    """Rows of an embedding [vocabulary, features]; indices outside the table give NaN rows."""
    if isinstance(w, Frozen):
        w = jax.lax.stop_gradient(w.value)
    # "fill" makes a token id beyond the vocabulary visible; the default would clamp it.
    return jnp.take(to_dense(w), indices, axis=0, mode="fill")


def split_spec(spec: PartitionSpec, ndim: int) -> tuple[list, Any, Any]:
    """(axes of stacked layers, of inputs, of outputs) that `spec` gives a kernel with `ndim` axes."""
    *stack, rows, columns = (*spec, *(None,) * (ndim - len(spec)))
    return stack, rows, columns


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """`vector` [N] with leading axes of size 1, to be broadcast against x [..., N]."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def to_dense(w: WeightLike) -> jax.Array:
    """The weight, structured or not, as one array."""
    return w.to_dense() if isinstance(w, Weight) else w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen(Weight):
    """A frozen weight: `adapt` makes it from every weight that no rule matches."""

    value: WeightLike = frozen_field()

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    @property
    def stack(self):
        # An array is already dense, so there is nothing to map over.
        return self.value.stack if is_weight(self.value) else ()

    def rmatmul(self, x):
        return frozen_matmul(x, self.value)

    def rgrouped(self, x, sizes):
        return frozen_grouped(x, self.value, sizes)

    def scaled_bias(self, bias):
        return scaled_bias(bias, jax.lax.stop_gradient(self.value))

    def to_dense(self):
        return jax.lax.stop_gradient(to_dense(self.value))

    def with_specs(self, spec):
        return Frozen(self.value.with_specs(spec) if is_weight(self.value) else spec)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(Weight):
    """W^T of a weight W [out, in], without a transposed copy: the output projection of tied embeddings."""

    weight: WeightLike

    @property
    def shape(self):
        *stack, rows, columns = self.weight.shape
        return (*stack, columns, rows)

    @property
    def dtype(self):
        return self.weight.dtype

    def rmatmul(self, x):
        dense = to_dense(self.weight).astype(x.dtype)
        return _dot(x, dense, transposed=True)

    def to_dense(self):
        return jnp.swapaxes(to_dense(self.weight), -1, -2)

    def with_specs(self, spec):
        stack, rows, columns = split_spec(spec, self.ndim)
        flipped = PartitionSpec(*stack, columns, rows)
        return Transposed(self.weight.with_specs(flipped) if is_weight(self.weight) else flipped)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extended(Weight):
    """A weight W [in, out] with one more row below it: [in + 1, out]. No copy of W is made for x W.

    For inputs whose last feature is 1, the row is a bias.
    """

    weight: WeightLike
    row: jax.Array  # [out]

    @property
    def shape(self):
        *stack, rows, columns = self.weight.shape
        return (*stack, rows + 1, columns)

    @property
    def dtype(self):
        return self.weight.dtype

    def rmatmul(self, x):
        return matmul(x[..., :-1], self.weight) + x[..., -1:] * along_last(
            self.row.astype(x.dtype), x
        )

    def to_dense(self):
        dense = to_dense(self.weight)
        return jnp.concatenate([dense, self.row[..., None, :].astype(dense.dtype)], axis=-2)

    def with_specs(self, spec):
        stack, _, columns = split_spec(spec, self.ndim)
        whole = PartitionSpec(*stack, None, columns)
        inner = self.weight.with_specs(whole) if is_weight(self.weight) else whole
        return Extended(inner, PartitionSpec(*stack, columns))
