"""Named streams of a run's single key."""

from __future__ import annotations

import hashlib

import jax


def stream(key: jax.Array, name: str, *steps: int | jax.Array) -> jax.Array:
    """The key for one use of `key` at one step: stream(key, "rollout", step).

    Two 32-bit words h(name) of a hash are folded in, then each step:

        fold_in(... fold_in(fold_in(fold_in(key, h_0), h_1), steps[0]) ..., steps[-1])

    No number that a caller folds into `key`, and no key of jax.random.split(key), gives the same key:
    those have one fold, streams have at least two. A name is always used with the same number of
    steps: stream(key, name, i) is also jax.random.split(stream(key, name), n)[i].

    Args:
        key: a jax.random.key of a run or of another stream.
        name: name of the use; a literal if the use is in a library.
        steps: integers from 0 to 2**32 - 1, which may be traced.
    """
    # hashlib instead of hash(): the same in every process.
    words = hashlib.blake2b(name.encode(), digest_size=8).digest()
    for number in (int.from_bytes(words[:4], "big"), int.from_bytes(words[4:], "big"), *steps):
        key = jax.random.fold_in(key, number)
    return key
