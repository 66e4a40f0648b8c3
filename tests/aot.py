"""Runs code in a process that can compile for devices that are not here."""

import atexit
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import threading

from jaxft.parallel import compile_environment

ROOT = pathlib.Path(__file__).parents[1]
# Reads code, a line of JSON each, and answers each with a line: [what it printed, its error].
SERVER = """
import contextlib, io, json, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), {"__name__": "__main__"})
    except Exception:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


def run_aot(code: str, timeout: float = 900, *, alone: bool = False) -> dict:
    """The last line that `code` prints, as JSON. Its process has the compilers of `make aot`.

    One process for TPUs and one for GPUs, whose compiler a TPU's before it would hide, run all code of this
    process, one after the other: to start one takes seconds. `alone`: in a separate process, for code
    that sets the environment.
    """
    kind = "gpu" if "h100" in code else "tpu"
    process, errors = start() if alone else server(kind)
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    finally:
        timer.cancel()
    if alone or not answer:
        process.kill()
    if not answer:
        server.cache_clear()  # the others die with this process
        errors.seek(0)
        raise AssertionError(f"its process ended: {errors.read()[-3000:]}")
    printed, error = json.loads(answer)
    assert error is None, error[-3000:]
    return json.loads(printed.strip().splitlines()[-1])


@functools.cache
def server(kind):
    """(process, its errors), started once for each kind."""
    return start()


def start():
    environment = compile_environment()
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    atexit.register(process.kill)
    return process, errors
