"""Monarch matrices: two block-diagonal factors with a fixed permutation between them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.kernels.monarch import monarch_product
from jaxft.weights.base import Weight, WeightLike, split_spec, to_dense, wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MonarchWeight(Weight):
    """A kernel [D, F] of which both factors train.

    Monarch: Dao et al., 2022, arxiv.org/abs/2204.00595. The input is read as x [K, I] and the
    output as y [L, J], both row-major, zero-padded to K I and L J:

        h[k, j, r] = Σ_i first[k, j, r, i] x[k, i]        y[l, j] = Σ_kr second[j, l, k, r] h[k, j, r]

    Each of the K J slices W[(k, :), (:, j)] therefore has rank at most R. Parameters: R (J K I + K L J).
    """

    first: jax.Array  # [K, J, R, I]
    second: jax.Array  # [J, L, K, R]
    features: tuple[int, int] = dataclasses.field(default=(0, 0), metadata={"static": True})

    @property
    def shape(self):
        return (*self.first.shape[:-4], *self.features)

    @property
    def dtype(self):
        return self.first.dtype

    def rmatmul(self, x):
        factors = self.first.astype(x.dtype), self.second.astype(x.dtype)
        return monarch_product(x, *factors, features=self.features[1])

    def to_dense(self):
        # [(k, i), (l, j)]: the product of each slice, in the order of inputs and outputs.
        w = jnp.einsum("kjri,jlkr->kilj", self.first, self.second)
        rows, columns = self.features
        return w.reshape(w.shape[0] * w.shape[1], -1)[:rows, :columns]

    def with_specs(self, spec):
        stack, rows, columns = split_spec(spec, self.ndim)
        # Blocks of inputs are sharded like the kernel's rows, blocks of outputs like its columns.
        first = PartitionSpec(*stack, rows, None, None, None)
        second = PartitionSpec(*stack, columns, None, None, None)
        return dataclasses.replace(self, first=first, second=second)


class Blocks(NamedTuple):
    """The partition of a kernel: K blocks of inputs, J of outputs, slices of rank R."""

    inputs: int
    outputs: int
    rank: int


class Cost(NamedTuple):
    """The cost of one kernel; multiply and add count as two operations."""

    parameters: int
    flops: int  # per token, forward
    bytes: int  # read and written for `tokens` tokens if intermediate values stay in fast memory


def monarch_blocks(
    shape: tuple[int, int],
    *,
    blocks: int | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    rank: int = 1,
) -> Blocks:
    """The partition of a kernel [D, F]: by `blocks` (the reference code's nblocks) or by K, J and R.

    With blocks=n, K = J = n and R = ceil(min(ceil(D/n), ceil(F/n)) / n), the reference's shapes
    if n divides them. "4 blocks" therefore has slices of high rank; the paper's square matrix is
    inputs=outputs=sqrt(D), rank=1, which is also the default (nearest integers).

    Raises:
        ValueError: for a kernel that is not a matrix, counts outside 1..size, or too high a rank.
    """
    if len(shape) != 2:
        raise ValueError(f"monarch: needs a matrix [in, out], got a weight of shape {shape}.")
    if blocks is not None:
        if inputs is not None or outputs is not None or rank != 1:
            raise ValueError("monarch: give blocks, or inputs, outputs and rank, not both.")
        _check_counts(shape, blocks, blocks)
        inputs = outputs = blocks
        rank = -(-min(-(-shape[0] // blocks), -(-shape[1] // blocks)) // blocks)
    inputs = round(math.sqrt(shape[0])) if inputs is None else inputs
    outputs = round(math.sqrt(shape[1])) if outputs is None else outputs
    _check_counts(shape, inputs, outputs)
    highest = min(-(-shape[0] // inputs), -(-shape[1] // outputs))
    if not 1 <= rank <= highest:
        raise ValueError(
            f"monarch: rank must lie in 1..{highest} for {inputs} x {outputs} blocks of a kernel "
            f"{shape}, got {rank}; more would add parameters and nothing else."
        )
    return Blocks(inputs, outputs, rank)


def monarch_weight(
    key: jax.Array,
    shape: tuple[int, int],
    cut: Blocks,
    *,
    init: Literal["reference", "variance_preserving"] = "reference",
    dtype: jnp.dtype = jnp.float32,
) -> MonarchWeight:
    """A random MonarchWeight for training from scratch.

    Every block is uniform in ±1/sqrt(fan_in), as in the reference code, which makes the variance
    of outputs 1/9 of the inputs'; "variance_preserving" multiplies both bounds by sqrt(3).
    """
    if init not in ("reference", "variance_preserving"):
        raise ValueError(
            f"monarch: unknown init {init!r}; expected reference or variance_preserving."
        )
    gain = 1.0 if init == "reference" else math.sqrt(3)
    keys = jax.random.split(key)
    shapes = _factor_shapes(shape, cut)
    fans = (shapes[0][-1], shapes[1][-1] * shapes[1][-2])
    draw = lambda k, s, fan: jax.random.uniform(k, s, dtype, -1, 1) * (gain / math.sqrt(fan))
    first, second = (draw(*part) for part in zip(keys, shapes, fans, strict=True))
    return MonarchWeight(first, second, tuple(shape))


def monarch_project(kernel: WeightLike, cut: Blocks) -> MonarchWeight:
    """The Monarch matrix nearest to `kernel` [D, F] in the Frobenius norm.

    The solution has a closed form: the slices are disjoint sets of entries, each of rank at most R, so each
    is truncated by its own singular values (paper, section 3.3). The squared error is the sum of
    the discarded singular values' squares.
    """
    dense = to_dense(kernel)
    dtype = dense.dtype
    dense = wide(dense)
    (k, j, r, i), (_, rows, _, _) = _factor_shapes(dense.shape, cut)
    padded = jnp.pad(dense, ((0, k * i - dense.shape[0]), (0, rows * j - dense.shape[1])))
    slices = padded.reshape(k, i, rows, j).transpose(0, 3, 2, 1)  # [K, J, L, I]
    u, s, v = jnp.linalg.svd(slices, full_matrices=False)
    root = jnp.sqrt(s[..., :r])
    first = root[..., None] * v[..., :r, :]
    second = (u[..., :r] * root[..., None, :]).transpose(1, 2, 0, 3)
    return MonarchWeight(first.astype(dtype), second.astype(dtype), tuple(dense.shape))


def monarch_cost(
    shape: tuple[int, int], cut: Blocks, *, tokens: int = 1, itemsize: int = 4
) -> Cost:
    """The cost of a Monarch kernel; a dense one has D F parameters and 2 D F operations per token."""
    parameters = sum(math.prod(s) for s in _factor_shapes(shape, cut))
    moved = (parameters + tokens * (shape[0] + shape[1])) * itemsize
    return Cost(parameters, 2 * parameters, moved)


def _factor_shapes(shape, cut):
    width, height = -(-shape[0] // cut.inputs), -(-shape[1] // cut.outputs)
    first = (cut.inputs, cut.outputs, cut.rank, width)
    return first, (cut.outputs, height, cut.inputs, cut.rank)


def _check_counts(shape, inputs, outputs):
    if not (1 <= inputs <= shape[0] and 1 <= outputs <= shape[1]):
        raise ValueError(
            f"monarch: a kernel {shape} can be cut into 1..{shape[0]} blocks of inputs and "
            f"1..{shape[1]} of outputs, got {inputs} and {outputs}."
        )
