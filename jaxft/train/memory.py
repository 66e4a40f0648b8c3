"""Memory: the least that a run needs, what is available, and how the CPU backend reuses it."""

from __future__ import annotations

import ctypes
import pathlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxft.parallel import LAYERS, TRANSFORMER_RULES, param_shardings
from jaxft.parallel.rules import Rules

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory_warm() -> bool:
    """Makes glibc keep freed memory, so that XLA's temporaries are not zeroed again at each step.

    XLA's CPU backend allocates temporaries in each call; glibc returns such large blocks to the
    kernel when they are freed, and the next step waits for thousands of page faults.
    In exchange, the process keeps the memory (mallopt(3): no mmap for large blocks, no trimming,
    one arena). Call it once, before the first computation but after jax.distributed is initialized.
    Returns whether it did anything, which is only on Linux with glibc and JAX on the CPU.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Before anything else: querying the backend starts its threads, and a thread that already has
    # its own arena keeps it and returns its memory to the kernel.
    alone = mallopt(_M_ARENA_MAX, 1) == 1
    if jax.default_backend() != "cpu":
        return False
    return alone and all(
        [mallopt(n, v) == 1 for n, v in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))]
    )


def check_memory(needed: Mapping[str, int], devices: Sequence[jax.Device], advice: str) -> None:
    """Raises, before anything is loaded or compiled, if a run cannot fit in memory.

    Args:
        needed: {what: bytes on one device} that the run certainly allocates.
        devices: devices of this process. CPU devices share the memory.
        advice: what would reduce the need, for the error message.

    Raises:
        ValueError: if the sum exceeds a device's memory or, on CPUs, the available memory.
    """
    there, on_cpu = device_memory(devices[0]), devices[0].platform == "cpu"
    needed = {what: size * len(devices) if on_cpu else size for what, size in needed.items()}
    total = sum(needed.values())
    if there is None or total <= there:
        return
    parts = ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in needed.items())
    where = "are available" if on_cpu else f"is what a {devices[0].device_kind} has"
    raise ValueError(
        f"this needs at least {total / 1e9:.1f} GB ({parts}), and {there / 1e9:.1f} GB {where}: {advice}"
    )


def device_memory(device: jax.Device) -> int | None:
    """Bytes of a device's memory; for a CPU, the bytes available now; None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    table = pathlib.Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text()) if table.exists() else None
    return int(found[1]) * 1024 if found else None


def state_bytes(
    shapes: Any,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TRANSFORMER_RULES,
    layers: str = LAYERS,
) -> dict[str, int]:
    """{what: bytes on one device} of the weights and, with an optimizer, of full training's state.

    Args:
        shapes: the params, a tree of arrays or ShapeDtypeStructs.
        optimizer: None: no weight trains.
        mesh: the mesh over which the weights lie.
        rules, layers: sharding rules of the model's family (`family_of(model.config)`).
    """
    if mesh is not None:
        here = lambda leaf, s: jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype)
        shapes = jax.tree.map(here, shapes, param_shardings(shapes, mesh, rules, layers))
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    result = {"weights": size(shapes)}
    if optimizer is not None:
        state = size(jax.eval_shape(optimizer.init, shapes))
        result |= {"gradients": size(shapes), "optimizer": state}
    return result
