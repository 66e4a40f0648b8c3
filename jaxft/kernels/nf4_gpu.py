"""NF4's product for a few rows on a GPU, by Triton: it reads the codes and writes only y."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxft.kernels.nf4_levels import nf4_level

MOST_ROWS = 64  # for more rows, writing W once and using the vendor's product is faster
LEAST_ROWS = 16  # of a tile, and of a block's half: the minimum of tensor cores
COLUMNS = 32  # of a tile: a kernel of 4096 columns then occupies 128 multiprocessors


def takes(rows: int, codes: tuple[int, int], scales: tuple[int, int]) -> bool:
    """True if `nf4_few_rows` supports this number of rows and arrays of these shapes."""
    half = codes[0] // scales[0]
    whole = codes[1] % COLUMNS == 0 and half >= 16 and half & (half - 1) == 0
    return rows <= MOST_ROWS and whole


def nf4_few_rows(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, dtype: Any, interpret: bool = False
) -> jax.Array:
    """x W of x [T, D], T <= MOST_ROWS, and the W [D, F] of `jaxft.kernels.nf4.nf4_dequantise`.

    Each program holds a tile of y and loops over the inputs: a block's codes, both halves, times x.

    Raises:
        ValueError: for more rows, columns that are not multiples of 32, or blocks other than 32,
            64, 128...
    """
    if not takes(x.shape[0], codes.shape, scales.shape):
        raise ValueError(
            f"nf4_product: 'triton' takes at most {MOST_ROWS} rows, columns in multiples of {COLUMNS} and "
            f"blocks of 32, 64, 128..., got {x.shape[0]} rows, {codes.shape[1]} columns and blocks "
            f"of {2 * codes.shape[0] // scales.shape[0]}; use 'xla'."
        )
    # Triton checks no bounds: rows fill a tile, inputs the last block.
    rows, inputs = max(LEAST_ROWS, pl.next_power_of_2(x.shape[0])), 2 * codes.shape[0]
    padded = jnp.pad(x, ((0, rows - x.shape[0]), (0, inputs - x.shape[1])))
    columns = codes.shape[1]
    y = pl.pallas_call(
        functools.partial(_kernel, codes.shape[0] // scales.shape[0], dtype),
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(columns // COLUMNS,),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda f: (0, 0)),
            pl.BlockSpec((codes.shape[0], COLUMNS), lambda f: (0, f)),
            pl.BlockSpec((scales.shape[0], COLUMNS), lambda f: (0, f)),
        ],
        out_specs=pl.BlockSpec((rows, COLUMNS), lambda f: (0, f)),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod((x.shape[0], inputs, columns)),
            bytes_accessed=(padded.size + rows * columns) * x.dtype.itemsize
            + codes.size
            + 4 * scales.size,
            transcendentals=0,
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="nf4_few_rows",
    )(padded, codes, scales)
    return y[: x.shape[0]]


def _kernel(half, dtype, x_ref, codes_ref, scales_ref, y_ref):
    def block(i, y):
        codes = codes_ref[pl.ds(i * half, half), :].astype(jnp.int32)
        scale = scales_ref[pl.ds(i, 1), :]
        for part, nibble in enumerate((codes >> 4, codes & 15)):
            w = (nf4_level(nibble) * scale).astype(dtype).astype(x_ref.dtype)
            y += triton.dot(x_ref[:, pl.ds((2 * i + part) * half, half)], w)
        return y

    y = jnp.zeros(y_ref.shape, jnp.float32)
    y_ref[...] = jax.lax.fori_loop(0, scales_ref.shape[0], block, y).astype(y_ref.dtype)
