"""Two live processes, one step each in turn, medians of CPU and wall seconds."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Dimensions of Llama-3.2-1B, of SmolLM2-135M, and of models small enough for many repeats, and for rollouts.
MODELS = {
    "1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    ),
    "135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    ),
    "30m": dict(
        vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    ),
    "3m": dict(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    ),
}  # fmt: skip


def environment(threads: int | None) -> dict[str, str]:
    """Variables of a side: so many threads, none of them spinning, no network. None: a GPU, all threads."""
    if threads is None:
        # Two processes share the GPU, in turn.
        return os.environ | {"HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC", "PJRT_NPROC")
    variables = dict.fromkeys(names, str(threads))
    variables |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    variables |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    if threads == 1:
        variables["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    return os.environ | variables


def warm_memory() -> None:
    """Makes glibc keep freed memory, as jaxft's launcher does, for the other side."""
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((-4, 0), (-1, -1), (-8, 1)):
        mallopt(option, value)


def serve(step: Callable[[], Any], finish: Callable[[], dict] | None = None, **facts: Any) -> None:
    """Warms up, says so, then runs one step for each line on standard input.

    `finish` is called after the last step, outside the times; what it returns is reported.
    """
    for _ in range(2):
        step()
    print(json.dumps({"ready": True, **facts}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": round(peak)} | (finish() if finish else {})), flush=True)


class Side:
    """A process that serves steps, started in `folder`: the checkout whose modules it imports."""

    def __init__(
        self,
        command: Sequence[str],
        threads: int | None,
        python: str = sys.executable,
        folder: str | None = None,
    ):
        self._process = subprocess.Popen(
            [python, *command],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads),
        )
        self.facts: dict[str, Any] = {}

    def ready(self) -> None:
        """Waits until it has compiled and warmed up."""
        self.facts = self._read("ready")

    def step(self) -> dict[str, float]:
        """Runs one step: {"wall", "cpu"} in seconds."""
        return self._ask("go", "wall")

    def end(self) -> dict[str, Any]:
        """Ends the process: its peak memory in MB, and what its `finish` reports."""
        return self._ask("end", "peak_mb")

    def _ask(self, word, key):
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._read(key)

    def _read(self, key):
        for line in self._process.stdout:
            # TRL also prints dicts, in single quotes.
            if line.startswith('{"') and key in (answer := json.loads(line)):
                return answer
        raise RuntimeError(
            f"a benchmark side ended before saying {key!r}; run it by itself to see why."
        )


def compare(
    ours: Sequence[str],
    theirs: Sequence[str],
    rounds: int,
    threads: int | None,
    peer_python: str = sys.executable,
    peer_folder: str | None = None,
) -> dict:
    """Alternates steps of both sides, the order swapped each round; medians and their ratio."""
    sides = {
        "jaxft": Side(ours, threads),
        "peer": Side(theirs, threads, peer_python, peer_folder),
    }
    for side in sides.values():
        side.ready()
    times: dict[str, list] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(sides[name].step())
    result: dict[str, Any] = {"rounds": rounds, "threads": threads}
    for name, side in sides.items():
        middle = lambda kind, name=name: statistics.median(t[kind] for t in times[name])
        result[name] = {
            "cpu_s": round(middle("cpu"), 3),
            "wall_s": round(middle("wall"), 3),
            **side.end(),
            **{k: v for k, v in side.facts.items() if k != "ready"},
        }
    for kind in ("cpu_s", "wall_s"):
        result[f"speedup_{kind}"] = round(result["peer"][kind] / result["jaxft"][kind], 3)
    return result
