"""One step of Lion on one array: the plain form, which XLA fuses, and a kernel for int8 momentum on TPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxft.kernels.counter_bits import counter_bits, hash_index, uniform
from jaxft.kernels.rounding import (
    BLOCK,
    Int8Blocks,
    block_shape,
    decode,
    dequantise,
    encode,
    quantise,
    stochastic_round,
)

Moment = jax.Array | Int8Blocks

ROWS = 8 * BLOCK  # of a kernel's tile: eight rows of scales fill a TPU's smallest tile
COLUMNS = 128


def lion_direction(grad, moment: Moment, seed, b1, b2) -> tuple[jax.Array, Moment]:
    """(sign(β1 m + (1 - β1) g), β2 m + (1 - β2) g), the moment in the form it came in.

    Computed in float32, in the order of optax's operations, so that results are equal to the last
    bit. `seed` rounds bfloat16 and int8 moments up or down at random; None: to nearest.
    """
    g = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
    m = dequantise(moment) if isinstance(moment, Int8Blocks) else moment.astype(g.dtype)
    direction = jnp.sign((1.0 - b1) * g + b1 * m)
    m = (1 - b2) * g + b2 * m
    if isinstance(moment, Int8Blocks):
        return direction, quantise(m, seed)
    if moment.dtype == jnp.bfloat16 and seed is not None:
        return direction, stochastic_round(m, counter_bits(seed, m.shape))
    return direction, m.astype(moment.dtype)


def lion_step(
    param: jax.Array,
    grad: jax.Array,
    moment: Moment,
    seeds: jax.Array | None,
    *,
    learning_rate,
    b1,
    b2,
    weight_decay,
    implementation: str | None = None,
) -> tuple[jax.Array, Moment]:
    """(θ - η (sign(β1 m + (1 - β1) g) + λ θ), β2 m + (1 - β2) g), in one pass over memory.

    Args:
        param: θ, any float; grad: g of its shape.
        moment: m, an array or int8 blocks.
        seeds: uint32 [2, 2], for the rounding of a bfloat16 or int8 moment and of bfloat16 params;
            None: to nearest.
        implementation: "xla" is the plain form. It is one fusion on TPUs and GPUs, except for int8,
            where the largest magnitude of a block must be known before its codes. "pallas" is a TPU
            kernel that keeps the block on the chip meanwhile. None: pallas on a single TPU if it
            applies; under a mesh call it inside shard_map.

    Raises:
        ValueError: if implementation is "pallas" and `kernel_applies` is False.
    """
    applies = kernel_applies(param, moment)
    if implementation is None:
        alone = jax.default_backend() == "tpu" and jax.device_count() == 1
        implementation = "pallas" if alone and applies else "xla"
    if implementation == "xla":
        return _reference(param, grad, moment, seeds, learning_rate, b1, b2, weight_decay)
    if not applies:
        raise ValueError(
            f"lion_step: no kernel for a moment of type {type(moment).__name__} and params of shape "
            f"{param.shape}; it takes Int8Blocks of matrices with at least {BLOCK} rows. Use 'xla'."
        )
    scalars = jnp.stack([jnp.float32(x) for x in (learning_rate, b1, b2, weight_decay)])
    return lion_int8_kernel(param, grad, moment, seeds, scalars)


def kernel_applies(param: jax.Array, moment: Moment) -> bool:
    """True if the kernel supports this leaf: int8 blocks of 256 rows, leading axes in whole blocks."""
    if not isinstance(moment, Int8Blocks) or param.ndim < 2:
        return False
    whole = param.ndim == 2 or param.shape[-2] % BLOCK == 0
    return whole and block_shape(param.shape)[-2:] == (BLOCK, 1)


def _reference(param, grad, moment, seeds, learning_rate, b1, b2, weight_decay):
    first, second = (None, None) if seeds is None else seeds
    direction, moment = lion_direction(grad, moment, first, b1, b2)
    p = param.astype(direction.dtype)
    p = p + (-1 * learning_rate) * (direction + weight_decay * p)
    if param.dtype == jnp.bfloat16 and second is not None:
        return stochastic_round(p, counter_bits(second, p.shape)), moment
    return p.astype(param.dtype), moment


def lion_int8_kernel(param, grad, moment, seeds, scalars, interpret: bool = False):
    """`lion_step` on a TPU for int8 blocks of 256 rows, in tiles of 2048 x 128 updated in place."""
    columns, stochastic = param.shape[-1], seeds is not None
    flat = lambda x: x.reshape(-1, columns)
    p, g, codes, scale = map(flat, (param, grad, moment.codes, moment.scale))
    rows, blocks = p.shape[0], scale.shape[0]
    high = min(ROWS // BLOCK, blocks)
    tile = pl.BlockSpec((high * BLOCK, COLUMNS), lambda i, j: (i, j))
    scales = pl.BlockSpec((high, COLUMNS), lambda i, j: (i, j))
    small = pl.BlockSpec(memory_space=pltpu.SMEM)
    seeds = jnp.zeros((2, 2), jnp.uint32) if seeds is None else seeds
    new = pl.pallas_call(
        functools.partial(_kernel, shape=(rows, columns), stochastic=stochastic),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (p, codes, scale)],
        grid=(pl.cdiv(blocks, high), pl.cdiv(columns, COLUMNS)),
        in_specs=[small, small, tile, tile, tile, scales],
        out_specs=[tile, tile, scales],
        input_output_aliases={2: 0, 4: 1, 5: 2},
        interpret=interpret,
    )(scalars, seeds, p, g, codes, scale)
    shapes = (param.shape, moment.codes.shape, moment.scale.shape)
    p, codes, scale = (x.reshape(shape) for x, shape in zip(new, shapes, strict=True))
    return p, Int8Blocks(codes, scale)


def _kernel(
    scalars, seeds, p_ref, g_ref, codes_ref, scale_ref, p_out, codes_out, scale_out, *, shape,
    stochastic,
):  # fmt: skip
    learning_rate, b1, b2, weight_decay = (scalars[i] for i in range(4))
    high = scale_ref.shape[0]
    tile = (high, BLOCK, COLUMNS)
    rows = jax.lax.broadcasted_iota(jnp.int32, (high * BLOCK, COLUMNS), 0)
    rows = rows + pl.program_id(0) * (high * BLOCK)
    index = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) + pl.program_id(1) * COLUMNS
    index = (rows * shape[1] + index).astype(jnp.uint32)
    count = jnp.uint32(shape[0] * shape[1] % 2**32)
    bits = lambda i: hash_index(index + count * seeds[i, 1], seeds[i, 0], seeds[i, 1])
    wide = lambda s: jnp.broadcast_to(s[:, None], tile).reshape(rows.shape)
    p, g = p_ref[...].astype(jnp.float32), g_ref[...].astype(jnp.float32)
    m = decode(codes_ref[...], wide(scale_ref[...]))
    c = (1.0 - b1) * g + b1 * m
    # jnp.sign queries the TPU's version, so it cannot be compiled on a machine without one.
    direction = jnp.where(c > 0, 1.0, jnp.where(c < 0, -1.0, c))
    m = (1 - b2) * g + b2 * m
    p = p + (-1 * learning_rate) * (direction + weight_decay * p)
    # Beyond the last row a tile is uninitialised: it must not count for a block's largest
    # magnitude.
    magnitude = jnp.where(rows < shape[0], jnp.abs(m), 0.0)
    scale = jnp.max(magnitude.reshape(tile), axis=1)
    codes_out[...] = encode(m, wide(scale), uniform(bits(0)) if stochastic else None)
    scale_out[...] = scale
    rounds = stochastic and p_out.dtype == jnp.bfloat16
    p_out[...] = stochastic_round(p, bits(1)) if rounds else p.astype(p_out.dtype)
