"""Memory of the CPU backend."""

from __future__ import annotations

import ctypes
import platform
import sys

import jax

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory_warm() -> bool:
    """Lets glibc keep freed memory, so that XLA's temporaries are not zeroed anew at each step.

    XLA's CPU backend allocates the temporaries of a call anew; glibc gives such large blocks back
    to the kernel when they are freed, and the next step waits for thousands of page faults.
    The price is memory that stays with the process (mallopt(3): no mmap for large blocks, no trimming,
    one arena). Call it once, before the first computation; with jax.distributed, after that is
    initialized. Returns whether it did anything: only on Linux with glibc and JAX on the CPU.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # First of all: asking for the backend starts its threads, and a thread that has an arena of its
    # own by then keeps it, and gives its memory back.
    alone = mallopt(_M_ARENA_MAX, 1) == 1
    if jax.default_backend() != "cpu":
        return False
    return alone and all(
        [mallopt(n, v) == 1 for n, v in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))]
    )
