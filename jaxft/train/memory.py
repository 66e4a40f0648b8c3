"""Memory: what a run needs at the least, what there is, and how the CPU backend keeps it."""

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


def check_memory(needed: Mapping[str, int], devices: Sequence[jax.Device], advice: str) -> None:
    """Raises, before anything is loaded or compiled, if a run cannot fit.

    Args:
        needed: {what: bytes on one device}, of what will be there for certain.
        devices: of this process. CPU devices share the memory.
        advice: what would need less.

    Raises:
        ValueError: if the sum is more than a device's memory; on CPUs, than what is available.
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
    """Bytes of a device's memory; of a CPU, those that are available now; None where it is not told."""
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
    """{what: bytes on one device} of weights and, with an optimizer that trains all, of what training adds.

    Args:
        shapes: of the params, a tree of arrays or ShapeDtypeStructs.
        optimizer: None: nothing of the weights trains.
        mesh: over which they lie.
        rules, layers: of the model's family (`family_of(model.config)`), by which they are laid out there.
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
