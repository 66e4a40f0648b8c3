"""Random numbers as a function of a seed and an index: generated where they are used, never stored.

`jax.random` draws with Threefry, whose loop XLA does not fuse: its bits are written to memory
before they are read. The hash here is plain arithmetic. XLA fuses it into the loop that consumes
it, on every backend and inside kernels; it gives the same bits however an array is sharded, and can
be replayed from 64 bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def counter_bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 bits of `shape`; entry i, in row-major order, is h(h((i + N seed[1]) ^ seed[0]) + seed[1]).

    h is `mix`, N the number of entries; all modulo 2^32. `seed` is uint32 [2], as `seeds` makes it.
    The quality is statistical, not cryptographic.
    """
    # The index starts from the seed: without it the index would be the same in every iteration of a
    # loop, and the compiler would store it before the loop.
    index = jnp.broadcast_to(seed[1], shape)
    for axis, length in enumerate(shape):
        index = index * jnp.uint32(length % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return hash_index(index, seed[0], seed[1])


def hash_index(index: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """The bits of `counter_bits` at i + N seed[1], for kernels that see a part of an array."""
    return mix(mix(index ^ first) + second)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all: "triple32".

    Wellons, 2018, github.com/skeeto/hash-prospector: found by search; measured bias 0.0208.
    """
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(14))


def seeds(key: jax.Array, number: int, *path: int | jax.Array) -> jax.Array:
    """uint32 [number, 2]: seeds of `counter_bits`, one for each leaf of a tree.

    `path` identifies a purpose, a step and so on: different numbers give different seeds. Seeds use
    only hashing, so that XLA fuses them, too, into the loop that consumes them.
    """
    seed = jax.random.key_data(key)[:2]
    for step in path:
        start = jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(2)
        seed = jnp.stack([hash_index(start + jnp.uint32(i), seed[0], seed[1]) for i in (0, 1)])
    return counter_bits(seed, (number, 2))


def uniform(bits: jax.Array) -> jax.Array:
    """float32 in (0, 1), never 0 or 1: the middles of 2^23 equal intervals."""
    # 23 bits, so that adding the half is exact; int32 in between, which every backend converts.
    return ((bits >> jnp.uint32(9)).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-23
