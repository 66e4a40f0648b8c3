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
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
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

    Lengths are padded to a multiple of 128. Windows must be known while tracing.

    On a mesh in context (jax.set_mesh; jaxft.train's steps set it) each device takes its rows of
    the batch over "data" and "fsdp", its key heads over "tensor" and its queries over "context",
    over which keys are gathered; an axis that does not divide them is left out. On several devices
    without a mesh, compiling fails: kernels can't be partitioned.

    Args: as for `attention`; interpret: run on any backend, slowly, for tests.

    Raises:
        ValueError: if the window is an array.
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
    beyond = -length % (TILE * place.shards)
    if not causal and beyond and segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)  # all except the padding
    pad = lambda x: jnp.pad(x, ((0, 0), (0, beyond)) + ((0, 0),) * (x.ndim - 2))
    query, key, value, segment_ids = jax.tree.map(pad, (query, key, value, segment_ids))
    kernel = _kernel(query, key, window, causal, softcap, interpret, place.shards)
    # The visited tiles differ between queries, and therefore between devices.
    mesh = AbstractMesh(tuple(place.axes.values()), tuple(place.axes))
    visits = NamedSharding(mesh, PartitionSpec(None, place.length))
    specs = (kernel.manual_sharding_spec(visits), *[place.states] * 3, place.tokens)
    specs = (*specs, PartitionSpec(place.heads))
    run = place.mapped(functools.partial(_on_one_device, place), specs)
    return run(kernel, query, key, value, segment_ids, sinks)[:, :length]


def _kernel(query, key, window, causal, softcap, interpret, shards):
    length, repeats = query.shape[1], query.shape[2] // key.shape[2]
    if window is None or window >= length:
        full, shape = splash.CausalMask if causal else splash.FullMask, (length, length)
        mask = full(shape)
    else:
        beside = (window - 1, 0 if causal else window - 1)
        mask = splash.LocalMask((length, length), beside, offset=0)
    # Larger blocks need fewer visits; 512 leaves room for heads of 256 (tests compile them).
    block = next(size for size in (512, 256, TILE) if length // shards % size == 0)
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


def _on_one_device(place, kernel, query, key, value, segment_ids, sinks):
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    key, value = place.whole(key), place.whole(value)
    ids = None if segment_ids is None else splash.SegmentIds(segment_ids, place.whole(segment_ids))
    sinks = None if sinks is None else sinks.reshape(groups, -1)
    over_groups = jax.vmap(kernel, in_axes=(0, 0, 0, None, None if sinks is None else 0))
    over_rows = jax.vmap(over_groups, in_axes=(0, 0, 0, None if ids is None else 0, None))
    out = over_rows(grouped, key.swapaxes(1, 2), value.swapaxes(1, 2), ids, sinks)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
