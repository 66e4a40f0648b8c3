"""The product of rows with a kernel of NormalFloat codes, without forming the whole kernel."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxft.kernels.backend import gpu_capability, on_one
from jaxft.kernels.nf4_gpu import nf4_few_rows, takes
from jaxft.kernels.nf4_levels import NF4_LEVELS, nf4_level

__all__ = ["NF4_LEVELS", "nf4_dequantise", "nf4_product"]


BLOCK = 64  # inputs that share a scale, as the kernel requires
# Widths of a tile of the kernel: wider tiles read x less often. As numbers of rows, both are
# multiples of 8 blocks.
WIDTHS = (1024, 512)
TOKENS = 256
MOST_VMEM = 40 << 20  # bytes; TPUs since v5e have 64 MiB or more


def nf4_dequantise(codes: jax.Array, scales: jax.Array, *, features: int, dtype: Any) -> jax.Array:
    """The kernel W [D, F] that codes and scales represent.

    QLoRA: Dettmers et al., 2023, arxiv.org/abs/2305.14314, eq. 5, without the outer constants.

    Args:
        codes: [blocks block / 2, F] uint8. Row p of a block's half holds the block's row p in its
            high bits, row block / 2 + p in its low ones: so both halves are contiguous.
        scales: [blocks, F] float32, the largest magnitude of each block.
        features: D; the last block may overhang.
        dtype: data type of W.
    """
    blocks, columns = scales.shape
    halves = codes.reshape(blocks, 1, -1, columns) >> jnp.array([4, 0], jnp.uint8).reshape(
        1, 2, 1, 1
    )
    dense = nf4_level(halves & 15) * scales[:, None, None]
    return dense.reshape(-1, columns)[:features].astype(dtype)


def nf4_product(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    features: int,
    dtype: Any,
    transposed: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x W, or x W^T if `transposed`, of x [..., D] (or [..., F]) and the W of `nf4_dequantise`.

    Args:
        x: inputs; the product is computed and returned in their data type, after rounding W to
            `dtype`.
        codes, scales, features, dtype: see nf4_dequantise.
        implementation: "xla": nf4_dequantise and a product, which XLA fuses on a TPU; on a GPU W is
            in memory temporarily. "pallas": a kernel for TPUs that dequantises each tile of W once
            into fast memory; needs blocks of 64. "triton": a kernel for GPUs and at most 64 rows,
            as in decoding, that reads the codes and never writes W. None: pallas on one TPU for at
            most 256 rows, triton on one GPU for at most 64, where they apply, else xla.
        interpret: run the kernel in Python, on any backend.

    Raises:
        ValueError: for an unknown implementation, or one that does not support this kernel.
    """
    implementation = implementation or _best(x, codes, scales, features, transposed)
    if implementation == "pallas":
        rows = x.reshape(-1, x.shape[-1])
        y = _tiled(rows, codes, scales, features, dtype, transposed, interpret)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    if implementation == "triton" and not transposed:
        rows = x.reshape(-1, x.shape[-1])
        y = nf4_few_rows(rows, codes, scales, dtype=dtype, interpret=interpret)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    if implementation != "xla":
        raise ValueError(
            f"nf4_product: unknown implementation {implementation!r}; expected xla, pallas, or triton, "
            "which has no transposed form."
        )
    dense = nf4_dequantise(codes, scales, features=features, dtype=dtype).astype(x.dtype)
    return jax.lax.dot_general(x, dense, (((x.ndim - 1,), (int(transposed),)), ((), ())))


def _best(x, codes, scales, features, transposed):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return "xla"
    rows = math.prod(x.shape[:-1])
    width = _width(codes.shape, features, x.dtype.itemsize, transposed)
    # With more rows the compiler's fusion is better: it overlaps steps that the kernel does in
    # sequence.
    if rows <= TOKENS and _block(codes, scales) == BLOCK and width and on_one("tpu"):
        return "pallas"
    few = not transposed and takes(rows, codes.shape, scales.shape)
    # Triton needs Ampere or a later GPU; one that is not here is the target of a compile.
    new = (gpu_capability() or (8, 0)) >= (8, 0)
    return "triton" if few and new and on_one("gpu") else "xla"


def _block(codes, scales):
    return 2 * codes.shape[0] // scales.shape[0]


def _kernel(block, inputs, dtype, transposed, x_ref, codes_ref, scales_ref, y_ref, w_ref):
    half = block // 2

    # Tokens are the inner axis of the grid: a tile of W serves all of them.
    @pl.when(pl.program_id(1) == 0)
    def _():
        def dequantise(i, _):
            start = pl.multiple_of(i * half, half)
            codes = codes_ref[pl.ds(start, half)].astype(jnp.int32)
            scale = scales_ref[pl.ds(i, 1)]
            for part, nibble in enumerate((codes >> 4, codes & 15)):
                levels = (nf4_level(nibble) * scale).astype(dtype)
                w_ref[pl.ds(pl.multiple_of(2 * start + part * half, half), half)] = levels.astype(
                    w_ref.dtype
                )

        jax.lax.fori_loop(0, scales_ref.shape[0], dequantise, None)

    w = w_ref[...] if transposed else w_ref[:inputs]
    dims = (((1,), (int(transposed),)), ((), ()))
    y = jax.lax.dot_general(x_ref[...], w, dims, preferred_element_type=jnp.float32)
    y_ref[...] = y.astype(y_ref.dtype)


def _tiled(x, codes, scales, features, dtype, transposed, interpret):
    """One tile of W holds all inputs of some outputs: columns of W, or rows if transposed."""
    block, columns = _block(codes, scales), codes.shape[1]
    width = _width(codes.shape, features, x.dtype.itemsize, transposed)
    if not width or block != BLOCK:
        raise ValueError(
            f"nf4_product: the kernel of 'pallas' takes blocks of {BLOCK}, and tiles that fit a TPU's "
            f"fast memory, got blocks of {block} and a weight {(features, columns)}; use 'xla'."
        )
    tokens, outputs = min(TOKENS, x.shape[0]), features if transposed else columns
    if transposed and width == outputs:
        width = 2 * codes.shape[0]  # the last block may overhang
    pick = (lambda f, t: (f, 0)) if transposed else (lambda f, t: (0, f))
    shape = (width, columns) if transposed else (2 * codes.shape[0], width)
    tile = lambda rows: pl.BlockSpec((shape[0] // rows, shape[1]), pick)
    return pl.pallas_call(
        functools.partial(_kernel, block, features, dtype, transposed),
        jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype),
        grid=(pl.cdiv(outputs, width), pl.cdiv(x.shape[0], tokens)),
        in_specs=[
            pl.BlockSpec((tokens, x.shape[1]), lambda f, t: (t, 0)),
            tile(2),
            tile(block),
        ],
        out_specs=pl.BlockSpec((tokens, width), lambda f, t: (t, f)),
        scratch_shapes=[pltpu.VMEM(shape, x.dtype)],
        cost_estimate=_cost(x, codes, scales, features, pl.cdiv(outputs, width), outputs),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2 * MOST_VMEM),
        interpret=interpret,
        name="nf4_transposed" if transposed else "nf4_product",
    )(x, codes, scales)


def _width(shape, features, itemsize, transposed) -> int:
    """The widest tile of outputs that fits fast memory, or 0."""
    inputs, outputs = shape[1] if transposed else 2 * shape[0], features if transposed else shape[1]
    for width in WIDTHS:
        width = min(width, outputs)
        # The tile, two buffers of its codes and scales, and two of rows of x and y.
        held = inputs * width * (itemsize + 1.25) + 2 * TOKENS * (inputs + width) * itemsize
        if held <= MOST_VMEM:
            return width
    return 0


def _cost(x, codes, scales, features, tiles, outputs):
    """Codes and scales are read once, x once for each tile of outputs (once if all its rows fit one)."""
    reads = 1 if x.shape[0] <= TOKENS else tiles
    moved = (x.size * reads + x.shape[0] * outputs) * x.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * math.prod((x.shape[0], features, codes.shape[1])),
        bytes_accessed=moved + codes.size + 4 * scales.size,
        transcendentals=0,
    )
