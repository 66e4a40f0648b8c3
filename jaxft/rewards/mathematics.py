"""Equality of mathematical expressions, by math-verify in a separate process."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

RUNNER = Path(__file__).with_name("_math_runner.py")
STARTUP = 300.0  # seconds for the process to import sympy
PATIENCE = 30  # wall-clock seconds for each second of CPU that a comparison may take
LONGEST = 300  # characters of an expression

_LOCK = threading.Lock()
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\(?:begin|end)\{\w+\}|\\[A-Za-z]+")
_NOTATION = re.compile(
    r"\\[A-Za-z]|[\^=<>√π∞∪+*]|\d[a-z]\b|[a-z]\d|\d!|"
    r"(?<![A-Za-z])(?:[a-z]\s*[-/]\s*[a-z\d]|\d\s*[-/]\s*[a-z])(?![A-Za-z])"
)
_FUNCTIONS = re.compile(
    r"\b(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?\b|\b(?:sqrt|log|exp|min|max|gcd|lcm|mod|det)\b"
)


def same_mathematics(found: str, answer: str, *, seconds: float = 2.0) -> bool:
    """True if two expressions in LaTeX, or in plain notation, are mathematically the same.

    math-verify compares them (Hugging Face, Apache 2.0): simplified by sympy, sets in any order, decimals
    to six places. False if it cannot read one, or exceeds `seconds` of CPU time; it never raises
    for an expression, and never hangs. Threads share the process, which is started at its first use
    (`start`), so that programs without such answers do not import sympy.

    Raises:
        ModuleNotFoundError: if math-verify is not installed.
    """
    if not (_readable(found) and _readable(answer)):
        return False
    request = json.dumps([found, answer, seconds])
    with _LOCK:
        process = start(wait=True)
        reply = _ask(process, request, PATIENCE * seconds)
        if reply is None:
            _end(process)
            _process.cache_clear()
    return reply == "true"


def is_mathematics(text: str) -> bool:
    """True if an answer needs more than the comparison of numbers and words: LaTeX, powers, variables."""
    return _readable(text) and bool(_NOTATION.search(text))


def start(*, wait: bool = False) -> subprocess.Popen:
    """Starts the process that compares, and returns it; `wait`: until it has imported sympy.

    Raises:
        ModuleNotFoundError: if math-verify is not installed.
    """
    process = _process(os.getpid())
    if wait and not process.ready:
        process.ready = _line(process, STARTUP) == "ready"
    return process


@functools.lru_cache(maxsize=1)
def _process(owner):
    """The comparing process of the process `owner`: a forked process needs its own."""
    del owner
    if importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError(
            "answers in mathematics need math-verify: pip install 'jaxft[text]'"
        )
    process = subprocess.Popen(
        [sys.executable, "-P", str(RUNNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        bufsize=0,
    )
    process.ready = False
    atexit.register(_end, process)
    return process


def _ask(process, request, seconds):
    """The reply, or None if the process died or exceeded its time."""
    if not process.ready:
        return None
    try:
        process.stdin.write(request.encode() + b"\n")
        return _line(process, seconds)
    except (BrokenPipeError, ConnectionResetError):
        return None


def _line(process, seconds):
    """One short line of the process's output; None at its end or after `seconds`."""
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline().decode().strip() or None if ready else None


def _end(process):
    process.kill()
    process.wait()
    process.stdin.close(), process.stdout.close()


def _readable(text):
    """True for an expression, False for prose, whose words would be products of variables."""
    # math-verify reads 52_8 as 52.
    if not text or len(text) > LONGEST or "\n" in text or re.search(r"\d\s*_", text):
        return False
    return not re.search(r"[^\W\d_]{3}", _FUNCTIONS.sub(" ", _COMMANDS.sub(" ", text)))
