"""Attention on TPUs: the splash kernels that come with JAX, for grouped queries and meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.parallel.attention import attention_layout

TILE = 128  # the least rows and columns that the kernels work on
# jax.ad_checkpoint.checkpoint_name of results that the kernels keep for their backward pass.
KERNEL_RESULT = "attention_kernel"


def splash_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    window: int | Int[Array, ""] | None = None,
    causal: bool = True,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """jaxft.kernels.attention as Pallas kernels, forward and backward, that store no scores.

    FlashAttention (Dao et al., 2022, arxiv.org/abs/2205.14135) over the tiles that the causal mask
    and the window leave; segment ids are compared within a tile. Padding (segment 0) sees padding
    here, but gets the mean of values in the reference: both results are meaningless.

    Lengths are padded to a multiple of 128. Windows must be known while tracing. If there are fewer queries
    than keys, they are those of the last tokens, and all tokens of a row must be on one device.

    On a mesh in context (jax.set_mesh; jaxft.train's steps set it) each device takes its rows of
    the batch over "data" and "fsdp", its key heads over "tensor" and its queries over "context",
    over which keys are gathered; an axis that does not divide them is left out. On several devices
    without a mesh, compiling fails: kernels can't be partitioned.

    Args: as for `attention`; interpret: run on any backend, slowly, for tests.

    Raises:
        ValueError: if the window is an array, or there are fewer queries than keys and a mesh splits them.
    """
    if isinstance(window, jax.Array):
        raise ValueError(
            "attention: 'splash' needs a window known while tracing, not an array, as in scanned layers "
            "that differ in their windows; unstack them "
            "(jaxft.models.unstack_layers) or use 'reference'."
        )
    # The kernel has no scale argument. In bfloat16 a power of two costs no accuracy.
    query = query * jnp.asarray(scale, query.dtype)
    place, length = attention_layout(query, key), query.shape[1]
    offset, tile = key.shape[1] - length, TILE * place.shards
    if offset and place.shards > 1:
        raise ValueError("splash_attention: queries of only the last tokens need whole rows.")
    if not causal and key.shape[1] % tile and segment_ids is None:
        segment_ids = jnp.ones(key.shape[:2], jnp.int32)  # all except the padding
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile)) + ((0, 0),) * (x.ndim - 2))
    ids = None if segment_ids is None else (segment_ids[:, offset:], segment_ids)
    query, key, value, ids = jax.tree.map(pad, (query, key, value, ids))
    kernel = _kernel(query, key, offset, window, causal, softcap, interpret, place.shards)
    # The visited tiles differ between queries, and therefore between devices.
    mesh = AbstractMesh(tuple(place.axes.values()), tuple(place.axes))
    visits = NamedSharding(mesh, PartitionSpec(None, place.length))
    specs = (kernel.manual_sharding_spec(visits), *[place.states] * 3, place.tokens)  # of both ids
    specs = (*specs, PartitionSpec(place.heads))
    run = place.mapped(functools.partial(_on_one_device, place), specs)
    return run(kernel, query, key, value, ids, sinks)[:, :length]


def _kernel(query, key, offset, window, causal, softcap, interpret, shards):
    shape, repeats = (query.shape[1], key.shape[1]), query.shape[2] // key.shape[2]
    if window is None or window >= shape[1]:
        mask = splash.CausalMask(shape, offset) if causal else splash.FullMask(shape)
    else:
        beside = (window - 1, 0 if causal else window - 1)
        mask = splash.LocalMask(shape, beside, offset=offset)
    # Larger blocks need fewer visits; 512 leaves room for heads of 256 (tests compile them).
    fits = lambda size: all(length // shards % size == 0 for length in shape)
    block = next(size for size in (512, 256, TILE) if fits(size))
    names = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()
    return splash.make_splash_mqa(
        splash.MultiHeadMask([mask] * repeats),
        head_shards=1,
        q_seq_shards=shards,
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=KERNEL_RESULT,
        interpret=interpret,
    )


def _on_one_device(place, kernel, query, key, value, ids, sinks):
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    key, value = place.whole(key), place.whole(value)
    ids = None if ids is None else splash.SegmentIds(ids[0], place.whole(ids[1]))
    sinks = None if sinks is None else sinks.reshape(groups, -1)
    over_groups = jax.vmap(kernel, in_axes=(0, 0, 0, None, None if sinks is None else 0))
    over_rows = jax.vmap(over_groups, in_axes=(0, 0, 0, None if ids is None else 0, None))
    out = over_rows(grouped, key.swapaxes(1, 2), value.swapaxes(1, 2), ids, sinks)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
