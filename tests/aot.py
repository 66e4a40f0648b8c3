"""Runs code in a process that can compile for devices that are not here."""

import json
import pathlib
import subprocess
import sys
import textwrap

from jaxft.parallel import compile_environment

ROOT = pathlib.Path(__file__).parents[1]


def run_aot(code: str, timeout: float = 900) -> dict:
    """What `code` prints last, as JSON. Its process has the compilers of `make aot`."""
    environment = compile_environment()
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=environment, timeout=timeout, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])
