"""Programs as chains of thought (P-CoT): results of a program's `solution()`, in a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUNNER = Path(__file__).with_name("_python_runner.py")


def run_python(program: str, *, seconds: float = 2.0, megabytes: int = 512) -> str | None:
    """The result of the program's `solution()`, as text; None if it does not return within the limits.

    A number, a text or a truth value is an answer; printed text is not. The program runs in a new
    interpreter, isolated (-I -S) and with an empty environment, that is killed with its children
    after `seconds` of wall-clock time, has the same limit of CPU time and `megabytes` of memory,
    and cannot open files or sockets. An audit hook refuses other operations: imports beyond math,
    fractions, datetime, itertools and the like, other processes, the file system. That guards
    against programs that a policy happens to write, not against an attacker; for that, use a
    virtual machine.

    No signal handler is set, so any thread may call it; a `ProcessPool` or a `VerifierPool` may run
    it too, with a longer timeout.

    Raises:
        ValueError: for limits that are not positive.
    """
    if seconds <= 0 or megabytes <= 0:
        raise ValueError(
            f"run_python: seconds and megabytes must be positive, got {seconds} and {megabytes}."
        )
    command = [sys.executable, "-I", "-S", str(RUNNER), str(seconds), str(megabytes)]
    with tempfile.TemporaryFile() as given:
        given.write(program.encode("utf-8", "replace"))
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
    with process:
        try:
            written, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # Also ends its children, which share its process group.
                os.killpg(process.pid, signal.SIGKILL)
    text = written.decode("utf-8", "replace")
    return text if process.returncode == 0 and text else None


def run_programs(
    programs: Sequence[str], *, workers: int = 4, seconds: float = 2.0, megabytes: int = 512
) -> list[str | None]:
    """`run_python` of each program, `workers` at a time."""
    run = lambda program: run_python(program, seconds=seconds, megabytes=megabytes)
    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(run, programs))
