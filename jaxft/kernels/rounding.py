"""Stochastic rounding to bfloat16, and int8 blocks whose steps grow with the value."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.kernels.counter_bits import counter_bits, uniform

BLOCK = 256  # numbers that share a scale
LEVELS = 127.0


class Int8Blocks(NamedTuple):
    """scale * sign(code) * (code / 127)²: an array in int8, with one float32 scale per block of 256."""

    codes: jax.Array  # int8, of the array's shape, so that it is sharded like the array
    scale: jax.Array  # float32, the largest magnitude of each block; see `block_shape`


def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds `x`, as float32, to bfloat16, up or down with the probabilities that make its mean x.

    16 random bits are added below bfloat16's mantissa, which is then truncated. `bits` is uint32 of
    x's shape; its low half is used. Infinities and NaN do not change.
    """
    x, low = x.astype(jnp.float32), jnp.uint32(0xFFFF)
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raw + (bits & low)) & ~low, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a block: up to 256 rows of a column; if there are fewer rows, several columns.

    Rows and columns are the last two axes. Blocks run along rows because a TPU's tiles then hold
    the scales without padding and reduce without crossing lanes.
    """
    if len(shape) == 1:
        return (min(shape[0], BLOCK),)
    rows, columns = shape[-2:]
    high = min(rows, BLOCK)
    return (1,) * (len(shape) - 2) + (high, min(columns, BLOCK // high))


def fills_a_block(shape: tuple[int, ...]) -> bool:
    """True if the last two axes hold at least 256 numbers, so that int8 saves memory."""
    return len(shape) > 0 and shape[-1] * (shape[-2] if len(shape) > 1 else 1) >= BLOCK


def quantise(x: jax.Array, seed: jax.Array | None = None) -> Int8Blocks:
    """Rounds `x`, as float32, to int8 blocks: to nearest, or with a seed up or down so that the mean is x.

    With r = |x| / scale and t = 127 sqrt(r), rounding t to the nearest integer is wrong by at most
    scale (t + 1/4) / 127². Square-law steps replace bitsandbytes' table of 256 values (Dettmers et
    al., 2022, arxiv.org/abs/2110.02861, section 2): they are as fine near 0 and need arithmetic
    instead of a table search.
    """
    x = x.astype(jnp.float32)
    scale = block_maximum(jnp.abs(x))
    draw = None if seed is None else uniform(counter_bits(seed, x.shape))
    return Int8Blocks(encode(x, spread(scale, x.shape), draw), scale)


def dequantise(blocks: Int8Blocks) -> jax.Array:
    """The float32 numbers of int8 blocks."""
    return decode(blocks.codes, spread(blocks.scale, blocks.codes.shape))


def encode(x: jax.Array, scale: jax.Array, draw: jax.Array | None) -> jax.Array:
    """int8 codes of `x` given each number's scale; `draw` is uniform in (0, 1); None: to nearest."""
    ratio = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0)
    code = LEVELS * jnp.sqrt(ratio)
    if draw is None:
        code = jnp.floor(code + 0.5)
    else:
        code = jnp.floor(code)
        # Between c² and (c + 1)², in units of scale / 127².
        share = (ratio * LEVELS**2 - code * code) / (2 * code + 1)
        code = jnp.where(draw < share, code + 1, code)
    code = jnp.minimum(code, LEVELS).astype(jnp.int32)
    return jnp.where(x < 0, -code, code).astype(jnp.int8)


def decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 numbers of codes given each number's scale."""
    code = codes.astype(jnp.int32).astype(jnp.float32)
    return scale * (code * jnp.abs(code)) * (1 / LEVELS**2)


def block_maximum(x: jax.Array) -> jax.Array:
    """The largest number of each block of a nonnegative array."""
    for axis, side in enumerate(block_shape(x.shape)):
        if side > 1:
            blocks = -(-x.shape[axis] // side)
            parts = (*x.shape[:axis], blocks, side, *x.shape[axis + 1 :])
            if missing := blocks * side - x.shape[axis]:
                x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
            x = jnp.max(x.reshape(parts), axis=axis + 1)
    return x


def spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each number's scale, of the array's shape."""
    for axis, side in enumerate(block_shape(shape)):
        if side > 1:
            scale = jnp.repeat(scale, side, axis=axis)
            if scale.shape[axis] != shape[axis]:
                scale = jax.lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
    return scale
