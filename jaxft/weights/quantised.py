"""Frozen kernels in few bits: int8, int4, fp8 with one scale per block, and NF4 with double quantisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxft.kernels.nf4 import NF4_LEVELS, nf4_dequantise, nf4_product
from jaxft.weights.base import Weight, WeightLike, frozen_field, linear_in_x, split_spec, to_dense

SCALES_PER_GROUP = 256

_LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedWeight(Weight):
    """values * scale, one scale for each block of inputs of each output; nothing trains.

    The dense kernel is formed for each product and again in the backward pass, never kept.
    """

    values: jax.Array = frozen_field()  # [D, F] int8, int4 or float8
    scale: jax.Array = frozen_field()  # [D / block, F] float32
    dense_dtype: Any = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return jnp.dtype(self.dense_dtype)

    def rmatmul(self, x):
        return _frozen_product(x, self)

    def to_dense(self):
        blocks, columns = self.scale.shape
        values = self.values.astype(jnp.float32).reshape(blocks, -1, columns)
        return (values * self.scale[:, None]).reshape(self.values.shape).astype(self.dtype)

    def with_specs(self, spec):
        return dataclasses.replace(self, values=spec, scale=spec)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4Weight(Weight):
    """NormalFloat codes of 4 bits in blocks of inputs, with scales of 8 bits; nothing trains.

    QLoRA: Dettmers et al., 2023, arxiv.org/abs/2305.14314, section 3. Blocks run along the inputs, as in
    bitsandbytes, which stores kernels transposed. Scales are quantised to 8 bits
    linearly around their mean, in groups of 256 (bitsandbytes: a nonlinear table); or they are float32,
    without steps and mean, for kernels that another library quantised (`nf4_exact`).
    """

    codes: jax.Array = frozen_field()  # [ceil(D / block) block / 2, F] uint8: see nf4_dequantise
    scale_codes: jax.Array = frozen_field()  # [ceil(D / block), F] int8, or float32: the scales
    scale_steps: jax.Array | None = frozen_field()  # [groups] float32
    scale_mean: jax.Array | None = frozen_field()  # []
    features: int = dataclasses.field(default=0, metadata={"static": True})  # D
    dense_dtype: Any = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self):
        return (*self.codes.shape[:-2], self.features, self.codes.shape[-1])

    @property
    def dtype(self):
        return jnp.dtype(self.dense_dtype)

    def rmatmul(self, x):
        return _frozen_product(x, self)

    def to_dense(self):
        return nf4_dequantise(self.codes, self.scales(), features=self.features, dtype=self.dtype)

    def scales(self) -> jax.Array:
        """The largest magnitude of each block, [blocks, F], dequantised."""
        if self.scale_steps is None:
            return self.scale_codes
        groups = self.scale_steps.shape[0]
        flat = self.scale_codes.T.reshape(-1).astype(jnp.float32)
        padded = jnp.pad(flat, (0, groups * SCALES_PER_GROUP - flat.size)).reshape(groups, -1)
        flat = (padded * self.scale_steps[:, None]).reshape(-1)[: flat.size] + self.scale_mean
        return flat.reshape(self.scale_codes.shape[::-1]).T

    def with_specs(self, spec):
        stack, _, columns = split_spec(spec, self.ndim)
        # Two rows share a byte, and blocks may overhang: rows stay together, columns may be split.
        split = PartitionSpec(*stack, None, columns)
        small = None if self.scale_steps is None else PartitionSpec(*stack)
        return dataclasses.replace(
            self, codes=split, scale_codes=split, scale_steps=small, scale_mean=small
        )


def quantised_weight(kernel: WeightLike, kind: str = "int8", *, block: int = 64) -> QuantisedWeight:
    """`kernel` [D, F] rounded to "int8", "int4" or "fp8" with exact largest magnitudes of blocks.

    Args:
        kernel: the kernel.
        kind: the format of the values.
        block: inputs that share a scale; if it does not divide D, all D share one.

    Raises:
        ValueError: for a kernel that is not a matrix, an unknown kind, or a block below 1.
    """
    dtype = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}.get(kind)
    if dtype is None:
        raise ValueError(f"quantised: unknown kind {kind!r}; expected int8, int4, fp8 or nf4.")
    dense = _matrix(kernel, block)
    rows, columns = dense.shape
    block = block if rows % block == 0 else rows
    parts = dense.reshape(rows // block, block, columns)
    scale = jnp.max(jnp.abs(parts), axis=1) / _LARGEST[dtype]
    values = parts / jnp.where(scale == 0, 1.0, scale)[:, None]
    if kind != "fp8":
        values = jnp.clip(jnp.round(values), -_LARGEST[dtype], _LARGEST[dtype])
    values = values.reshape(rows, columns).astype(dtype)
    return QuantisedWeight(values, scale, str(kernel.dtype))


def nf4_weight(kernel: WeightLike, *, block: int = 64) -> Nf4Weight:
    """`kernel` [D, F] as NF4: 4.13 bits per number for blocks of 64.

    Raises:
        ValueError: for a kernel that is not a matrix, or an odd block.
    """
    dense = _matrix(kernel, block)
    if block % 2:
        raise ValueError(f"nf4: block must be even, got {block}; 64 is usual.")
    rows, columns = dense.shape
    blocks = -(-rows // block)
    parts = jnp.pad(dense, ((0, blocks * block - rows), (0, 0))).reshape(blocks, block, columns)
    scale = jnp.max(jnp.abs(parts), axis=1)
    unit = parts / jnp.where(scale == 0, 1.0, scale)[:, None]
    middles = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    codes = jnp.searchsorted(middles, unit.reshape(-1, columns)).astype(jnp.uint8)
    return nf4_from_codes(codes, scale, kernel.dtype, rows)


def nf4_from_codes(
    codes: jax.Array, scale: jax.Array, dtype: Any, features: int | None = None
) -> Nf4Weight:
    """An Nf4Weight of codes [blocks block, F], one per byte, and exact scales [blocks, F].

    Args:
        codes: 0..15, indices of NF4_LEVELS.
        scale: largest magnitudes, float32; they are rounded to 8 bits here.
        dtype: of the dense kernel.
        features: D; None: all rows of the codes.
    """
    blocks, columns = scale.shape
    flat = scale.T.reshape(-1)
    mean = jnp.mean(flat)
    groups = -(-flat.size // SCALES_PER_GROUP)
    # Padding with the mean does not change the steps of the last group.
    centred = jnp.pad(flat - mean, (0, groups * SCALES_PER_GROUP - flat.size)).reshape(groups, -1)
    steps = jnp.max(jnp.abs(centred), axis=1) / 127
    scale_codes = jnp.round(centred / jnp.where(steps == 0, 1.0, steps)[:, None])
    scale_codes = scale_codes.reshape(-1)[: flat.size].reshape(columns, blocks).T.astype(jnp.int8)
    features = len(codes) if features is None else features
    packed = _pack(codes, blocks)
    return Nf4Weight(packed, scale_codes, steps, mean, features, str(jnp.dtype(dtype)))


def nf4_exact(codes: np.ndarray, scale: np.ndarray, dtype: Any) -> Nf4Weight:
    """An Nf4Weight of codes [D, F], one per byte, and scales [blocks, F], kept in float32: 4.5 bits each.

    The arguments and the weight's fields are arrays on the host.
    """
    packed = _pack(np.ascontiguousarray(codes, np.uint8), len(scale))
    scale = np.ascontiguousarray(scale, np.float32)
    return Nf4Weight(packed, scale, None, None, len(codes), str(jnp.dtype(dtype)))


def _pack(codes, blocks):
    """Two codes per byte, with a block's first half in the high bits: see nf4_dequantise."""
    halves = codes.reshape(blocks, 2, -1, codes.shape[-1])
    return ((halves[:, 0] << 4) | halves[:, 1]).reshape(-1, codes.shape[-1])


def nf4_codes(weight: Nf4Weight) -> jax.Array:
    """The codes [blocks block, F] of a weight, one per byte, in the order of the inputs."""
    blocks, columns = weight.scale_codes.shape
    packed = weight.codes.reshape(blocks, -1, columns)
    return jnp.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1, columns)


def bits_per_parameter(weight: Weight) -> float:
    """Bits of storage per parameter, counting all arrays of the weight."""
    bits = lambda leaf: leaf.size * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize)
    return sum(map(bits, jax.tree.leaves(weight))) / np.prod(weight.shape)


def quantisation_error(kernel: WeightLike, weight: Weight) -> float:
    """|W - Q| / |W| in the Frobenius norm: the error of rounding, and of any merge into it."""
    dense = to_dense(kernel).astype(jnp.float32)
    lost = jnp.linalg.norm(to_dense(weight).astype(jnp.float32) - dense)
    return float(lost / jnp.maximum(jnp.linalg.norm(dense), 1e-30))


def _matrix(kernel, block):
    if len(kernel.shape) != 2 or block < 1:
        raise ValueError(
            f"quantised: needs a matrix [in, out] and a block of at least 1, got a weight of shape "
            f"{kernel.shape} and {block}."
        )
    return to_dense(kernel).astype(jnp.float32)


@linear_in_x
def _frozen_product(x, weight):
    if isinstance(weight, Nf4Weight):
        options = dict(features=weight.features, dtype=weight.dtype)
        return nf4_product(x, weight.codes, weight.scales(), **options)
    # For int8, int4 and fp8, XLA fuses the scaling into the product if that is faster.
    return x @ weight.to_dense().astype(x.dtype)
