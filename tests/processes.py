"""Several processes on this machine, each with two CPU devices, that meet over gloo as hosts do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = str(
    ROOT / "tests/without_torch"
)  # on the path, it hides torch, which takes seconds to import


def child_flags():
    """XLA's flags of this process, except its eight devices: a child's numbers are the same bit for bit."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if "device_count" not in flag)


def start_processes(count, command, *, devices=2):
    """`python *command` in so many processes, their output as text in pipes.

    The variables are those that `jaxft.parallel.connect_hosts` reads.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), WITHOUT_TORCH]),
        "XLA_FLAGS": child_flags(),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment | {"JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def run_processes(count, command, *, devices=2, timeout=240):
    """(exit codes, outputs without Gloo's own lines, errors) of `start_processes`, awaited."""
    processes = start_processes(count, command, devices=devices)
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    ours = lambda text: "".join(x for x in text.splitlines(True) if not x.startswith("[Gloo]"))
    return codes, [ours(out) for out, _ in results], [error for _, error in results]
