"""The product of rows with a Monarch matrix."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Inexact

from jaxft.kernels.backend import on_one, target_platform
from jaxft.kernels.pullback import pick, with_pullback

# With more blocks than this, one product per block costs more in overhead than it saves in copies.
MOST_UNROLLED = 8
LANES = 128
TOKENS = 128  # of a tile; also the lanes of the transposed tiles
MOST_VMEM = 48 << 20  # bytes; TPUs since v5e have 64 MiB or more

Implementation = Literal["batched", "unrolled", "pallas"]


def monarch_product(
    x: Inexact[Array, "*batch D"],
    first: Inexact[Array, "K J R I"],
    second: Inexact[Array, "J L K R"],
    *,
    features: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Inexact[Array, "*batch F"]:
    """The product of x with the matrix of two factors; see MonarchWeight.

    Args:
        x: inputs, D <= K I; padded with zeros to K I.
        first: the factor that is applied first, in x's data type.
        second: the other factor.
        features: F <= L J, the number of outputs; None: all.
        implementation: "batched": two batched matrix products. "unrolled": one product for each
            block, which reads and writes slices instead of permuted copies; on a CPU 1.4 to 2 times
            as fast for 4 blocks. "pallas": one kernel for TPUs, which keeps the middle vector in
            fast memory and recomputes it in the backward pass. None: unrolled on a CPU if both
            factors have at most 8 blocks; pallas on one TPU if the factors fit; else batched.
        interpret: run the kernel of "pallas" in Python, on any backend.

    Raises:
        ValueError: for an unknown implementation.
    """
    features = second.shape[0] * second.shape[1] if features is None else features
    implementation = implementation or _best(x, first, second, features)
    if implementation == "pallas":
        y = _fused(features, interpret)(x.reshape(-1, x.shape[-1]), first, second)
        return y.reshape(*x.shape[:-1], features)
    if implementation not in ("unrolled", "batched"):
        raise ValueError(
            f"monarch_product: unknown implementation {implementation!r}; "
            "expected batched, unrolled or pallas."
        )
    product = _unrolled if implementation == "unrolled" else _batched
    return _padded(product, features, x, first, second)


def _best(x, first, second, features) -> Implementation:
    few = max(first.shape[0], second.shape[0]) <= MOST_UNROLLED
    if few and target_platform() == "cpu":
        return "unrolled"
    sizes = _Sizes.of(first, second, x.shape[-1], features)
    real = x.dtype in (jnp.bfloat16, jnp.float32)
    fits = sizes.vmem_bytes(x.dtype.itemsize) <= MOST_VMEM
    return "pallas" if real and fits and on_one("tpu") else "batched"


def _padded(product, features, x, first, second):
    missing = first.shape[0] * first.shape[3] - x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    return product(x, first, second)[..., :features]


def _batched(x, first, second):
    blocks, _, _, width = first.shape
    h = jnp.einsum("...ki,kjri->...kjr", x.reshape(*x.shape[:-1], blocks, width), first)
    y = jnp.einsum("...kjr,jlkr->...lj", h, second)
    return y.reshape(*y.shape[:-2], -1)


def _unrolled(x, first, second):
    inputs, outputs, rank, width = first.shape
    height = second.shape[1]
    # Split, not slices: the gradient of slices is a sum of padded copies, that of a split one
    # concatenation.
    split = functools.partial(jnp.split, axis=-1)
    maps = [f.reshape(outputs * rank, width).T for f in first]
    middle = [split(p @ f, outputs) for p, f in zip(split(x, inputs), maps, strict=True)]
    columns = []
    for own, factor in zip(zip(*middle, strict=True), second, strict=True):
        h = jnp.concatenate(own, axis=-1)
        columns.append(h @ factor.reshape(height, inputs * rank).T)
    return jnp.stack(columns, axis=-1).reshape(*x.shape[:-1], height * outputs)


class _Sizes(NamedTuple):
    """The sizes of one product, named as in MonarchWeight."""

    k: int
    j: int
    r: int
    i: int
    l: int  # noqa: E741
    d: int
    f: int

    @classmethod
    def of(cls, first, second, inputs, features):
        return cls(*first.shape, second.shape[1], inputs, features)

    @property
    def pitch(self) -> int:
        """Rows between the parts [J R] of two blocks k: J R, rounded up to whole sublanes."""
        return -(-self.j * self.r // 8) * 8

    def windows(self) -> list[tuple[int, int, int]]:
        """For each k the lanes start..stop of x that hold block k, at whole tiles, and its offset.

        A block may begin inside a tile. Its factor is therefore padded with zeros, so that the
        window's other lanes contribute nothing and x is never shifted.
        """
        found = []
        for k in range(self.k):
            start = min(k * self.i, self.d) // LANES * LANES
            stop = min(-(-(k + 1) * self.i // LANES) * LANES, self.d)
            found.append((start, max(start, stop), k * self.i - start))
        return found

    @property
    def window(self) -> int:
        """The width of the widest window."""
        return max(stop - start for start, stop, _ in self.windows())

    def vmem_bytes(self, itemsize: int) -> int:
        """Bytes of the backward kernel, the larger one: two tiles of each operand, and the scratch."""
        parameters = self.j * self.r * (self.k * max(self.window, self.i) + self.l * self.k)
        features = 2 * self.d + self.f
        scratch = parameters * (4 + itemsize) + TOKENS * 4 * (
            2 * self.k * self.pitch + self.l * self.j + self.d
        )
        return 4 * parameters * itemsize + 2 * TOKENS * features * itemsize + scratch


# The kernels work on transposed tiles, features along sublanes and tokens along lanes. There both
# permutations are strided loads and stores; along lanes each would be a shuffle. The cost is one
# transposition of a tile (of y, of its cotangent) inside the kernel.
_NT, _NN, _TN = ((((a,), (b,)), ((), ())) for a, b in ((1, 1), (1, 0), (0, 0)))


def _dot(a, b, dims):
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _pad_first(sizes, first_ref, padded_ref):
    padded_ref[...] = jnp.zeros_like(padded_ref)
    for k, (start, stop, offset) in enumerate(sizes.windows()):
        width = min(sizes.i, stop - start - offset)
        if width > 0:
            part = first_ref[k, :width].T if sizes.r == 1 else first_ref[k, :, :width]
            padded_ref[k, :, offset : offset + width] = part


def _middle(sizes, x, padded_ref, h_ref):
    """h [(k, j, r), tokens] = first x, a block of rows for each k."""
    for k, (start, stop, _) in enumerate(sizes.windows()):
        h = _dot(padded_ref[k, :, : stop - start], x[:, start:stop], _NT)
        h_ref[k * sizes.pitch : k * sizes.pitch + sizes.j * sizes.r] = h


def _rows(sizes, j):
    """Slices of [(k, j, r), tokens] that hold the rows (k, r) of output block j; the caller joins them."""
    if sizes.r == 1:
        return [pl.ds(j, sizes.k, stride=sizes.pitch)]
    return [pl.ds(k * sizes.pitch + j * sizes.r, sizes.r) for k in range(sizes.k)]


def _read(ref, slices):
    parts = [ref[s] for s in slices]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _forward_kernel(
    sizes, x_ref, first_ref, second_ref, y_ref, padded_ref, flipped_ref, h_ref, t_ref
):
    @pl.when(pl.program_id(0) == 0)
    def _():
        _pad_first(sizes, first_ref, padded_ref)
        for j in range(sizes.j):
            flipped_ref[j] = second_ref[j].T

    x = x_ref[...]
    _middle(sizes, x, padded_ref, h_ref)
    for j in range(sizes.j):
        h = _read(h_ref, _rows(sizes, j)).astype(x.dtype)
        t_ref[pl.ds(j, sizes.l, stride=sizes.j)] = _dot(flipped_ref[j], h, _NN)
    y_ref[...] = t_ref[: sizes.f].T.astype(y_ref.dtype)


def _backward_kernel(
    sizes, tokens, x_ref, g_ref, first_ref, second_ref, dx_ref, dfirst_ref, dsecond_ref,
    padded_ref, h_ref, dh_ref, t_ref, dx_sum, dfirst_sum, dsecond_sum,
):  # fmt: skip
    step, last = pl.program_id(0), pl.num_programs(0) - 1

    @pl.when(step == 0)
    def _():
        _pad_first(sizes, first_ref, padded_ref)
        t_ref[...] = jnp.zeros_like(t_ref)
        dfirst_sum[...] = jnp.zeros_like(dfirst_sum)
        dsecond_sum[...] = jnp.zeros_like(dsecond_sum)

    x, g = x_ref[...], g_ref[...].astype(jnp.float32)
    if tokens % x.shape[0]:  # data beyond the last token may be NaN
        here = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) < tokens - step * x.shape[0]
        x, g = jnp.where(here, x, jnp.zeros_like(x)), jnp.where(here, g, 0.0)
    _middle(sizes, x, padded_ref, h_ref)
    t_ref[: sizes.f] = g.T
    for j in range(sizes.j):
        own = t_ref[pl.ds(j, sizes.l, stride=sizes.j)].astype(x.dtype)
        h = _read(h_ref, _rows(sizes, j)).astype(x.dtype)
        dsecond_sum[j] += _dot(h, own, _NT)
        dh, row = _dot(second_ref[j], own, _NN), 0
        for part in _rows(sizes, j):
            dh_ref[part] = dh[row : row + part.size]
            row += part.size
    dx_sum[...] = jnp.zeros_like(dx_sum)
    for k, (start, stop, _) in enumerate(sizes.windows()):
        dh = dh_ref[k * sizes.pitch : k * sizes.pitch + sizes.j * sizes.r].astype(x.dtype)
        dfirst_sum[k, :, : stop - start] += _dot(dh, x[:, start:stop], _NN)
        dx_sum[:, start:stop] += _dot(dh, padded_ref[k, :, : stop - start], _TN)
    dx_ref[...] = dx_sum[...].astype(dx_ref.dtype)

    @pl.when(step == last)
    def _():
        dsecond_ref[...] = dsecond_sum[...].astype(dsecond_ref.dtype)
        dfirst_ref[...] = jnp.zeros_like(dfirst_ref)
        for k, (start, stop, offset) in enumerate(sizes.windows()):
            width = min(sizes.i, stop - start - offset)
            if width > 0:
                part = dfirst_sum[k, :, offset : offset + width].astype(dfirst_ref.dtype)
                if sizes.r == 1:
                    dfirst_ref[k, :width] = part.T
                else:
                    dfirst_ref[k, :, :width] = part


def _fused(features, interpret):
    return with_pullback(
        functools.partial(_padded, _batched, features),
        lambda wanted, *args: (_fused_forward(features, interpret, *args), ()),
        lambda wanted, args, _, g: pick(wanted, _fused_backward(features, interpret, *args, g)),
    )


def _fused_forward(features, interpret, x, first, second):
    sizes = _Sizes.of(first, second, x.shape[-1], features)
    rows, whole = _specs()
    operands = [x, *_flat(sizes, first, second)]
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes),
        jax.ShapeDtypeStruct((x.shape[0], features), x.dtype),
        grid=(pl.cdiv(x.shape[0], TOKENS),),
        in_specs=[rows(sizes.d), *map(whole, operands[1:])],
        out_specs=rows(features),
        scratch_shapes=[
            pltpu.VMEM((sizes.k, sizes.j * sizes.r, sizes.window), x.dtype),
            pltpu.VMEM((sizes.j, sizes.l, sizes.k * sizes.r), x.dtype),
            pltpu.VMEM((sizes.k * sizes.pitch, TOKENS), jnp.float32),
            pltpu.VMEM((sizes.l * sizes.j, TOKENS), jnp.float32),
        ],
        cost_estimate=_cost(sizes, x, 1),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2 * MOST_VMEM),
        interpret=interpret,
        name="monarch_forward",
    )(*operands)


def _fused_backward(features, interpret, x, first, second, g):
    sizes = _Sizes.of(first, second, x.shape[-1], features)
    rows, whole = _specs()
    factors = _flat(sizes, first, second)
    middle = pltpu.VMEM((sizes.k * sizes.pitch, TOKENS), jnp.float32)
    dx, dfirst, dsecond = pl.pallas_call(
        functools.partial(_backward_kernel, sizes, x.shape[0]),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *factors)],
        grid=(pl.cdiv(x.shape[0], TOKENS),),
        in_specs=[rows(sizes.d), rows(features), *map(whole, factors)],
        out_specs=[rows(sizes.d), *map(whole, factors)],
        scratch_shapes=[
            pltpu.VMEM((sizes.k, sizes.j * sizes.r, sizes.window), x.dtype),
            middle,
            middle,
            pltpu.VMEM((sizes.l * sizes.j, TOKENS), jnp.float32),
            pltpu.VMEM((TOKENS, sizes.d), jnp.float32),
            pltpu.VMEM((sizes.k, sizes.j * sizes.r, sizes.window), jnp.float32),
            pltpu.VMEM(factors[1].shape, jnp.float32),
        ],
        cost_estimate=_cost(sizes, x, 2),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2 * MOST_VMEM),
        interpret=interpret,
        name="monarch_backward",
    )(x, g, *factors)
    return dx, *_unflat(sizes, dfirst, dsecond)


def _flat(sizes, first, second):
    """[K, J R, I], or [K, I, J] where R is 1, and [J, K R, L]: the orders in which XLA lays out
    params of these shapes on a TPU, so that nothing or little is copied."""
    flat = first.transpose(0, 3, 1, 2)[..., 0] if sizes.r == 1 else _merge(first, 1)
    return flat, _merge(second.transpose(0, 2, 3, 1), 1)


def _unflat(sizes, first, second):
    shape = (sizes.k, sizes.i, sizes.j, 1) if sizes.r == 1 else (sizes.k, sizes.j, sizes.r, sizes.i)
    first = first.reshape(shape)
    second = second.reshape(sizes.j, sizes.k, sizes.r, sizes.l)
    return first.transpose(0, 2, 3, 1) if sizes.r == 1 else first, second.transpose(0, 3, 1, 2)


def _merge(array, axis):
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _specs():
    rows = lambda width: pl.BlockSpec((TOKENS, width), lambda t: (t, 0))
    whole = lambda array: pl.BlockSpec(array.shape, lambda t: (0,) * array.ndim)
    return rows, whole


def _cost(sizes, x, passes):
    """Bytes and FLOPs of the kernel, which reads or writes each operand once."""
    parameters = sizes.j * sizes.r * sizes.k * (sizes.i + sizes.l)
    # Backward: h again, then two products per factor.
    products = parameters if passes == 1 else 2 * parameters + sizes.j * sizes.r * sizes.k * sizes.i
    moved = x.shape[0] * (passes * sizes.d + sizes.f) + passes * parameters
    return pl.CostEstimate(
        flops=2 * math.prod((x.shape[0], products)),
        bytes_accessed=moved * x.dtype.itemsize,
        transcendentals=0,
    )
