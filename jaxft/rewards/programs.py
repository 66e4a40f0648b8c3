"""Programs as chains of thought (P-CoT): what a program's `solution()` returns, from a process of its own."""

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
    """What the program's `solution()` returns, as text; None if it does not within the limits.

    A number, a text or a truth value is an answer; what is printed is none. The program runs in a new
    interpreter, isolated (-I -S) and with an empty environment, that is killed with its children after
    `seconds` of wall-clock time, has as much CPU time and `megabytes` of memory, and can open no file and no
    socket. An audit hook refuses what else the interpreter reports: imports beyond math, fractions,
    datetime, itertools and their like, other processes, the file system. That guards against what a policy
    happens to write, not against an attacker, who would need a virtual machine.

    No signal handler is set, so any thread may call it; `run_python` is a function for a `ProcessPool` or a
    `VerifierPool` too, whose own timeout should be longer.

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
            if process.poll() is None:  # With its children, which have its process group.
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
