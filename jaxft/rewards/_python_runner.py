"""Runs the program on its standard input and writes what its `solution()` returns; see `run_python`.

A bare interpreter (-I -S) starts it as a script: it imports nothing of jaxft.
"""

import collections  # noqa: F401  Loaded here because a program cannot load modules.
import datetime  # noqa: F401
import decimal
import fractions
import functools  # noqa: F401
import heapq  # noqa: F401
import io
import itertools  # noqa: F401
import math
import operator  # noqa: F401
import os
import random  # noqa: F401
import re  # noqa: F401
import resource
import statistics  # noqa: F401
import string  # noqa: F401
import sys

LONGEST = 1000  # characters of an answer
# Audit events that a program may cause (docs.python.org/3/library/audit_events.html).
HARMLESS = frozenset(
    "compile exec builtins.id object.__getattr__ object.__setattr__ object.__delattr__ code.__new__ "
    "function.__new__ sys._getframe sys.excepthook sys.unraisablehook time.sleep gc.get_objects".split()
)


def main(seconds: float, megabytes: int) -> None:
    """Limits this process, runs the program, and writes the answer, or nothing."""
    program = sys.stdin.read()
    write, limit = sys.stdout.write, resource.setrlimit
    flush = sys.stdout.flush
    sys.stdout = sys.stderr = io.StringIO()  # Printed output is not an answer.
    cpu = math.ceil(seconds)
    limit(resource.RLIMIT_CPU, (cpu, cpu))
    limit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    limit(resource.RLIMIT_CORE, (0, 0))
    limit(resource.RLIMIT_FSIZE, (0, 0))
    limit(resource.RLIMIT_NOFILE, (0, 0))  # No file and no socket can be opened.
    scope = {"__name__": "program"}

    def refuse(event, arguments, harmless=HARMLESS):
        if event not in harmless:
            raise PermissionError(f"{event} is not allowed")

    sys.addaudithook(refuse)
    try:
        exec(compile(program, "program", "exec"), scope)
        value = scope["solution"]()
    except BaseException:
        return
    text = answer_text(value)
    if text is not None:
        write(text)
        flush()


def answer_text(value) -> str | None:
    """A number or a text as text; None for anything else, and for values too long or not finite."""
    if not isinstance(value, (int, float, str, fractions.Fraction, decimal.Decimal)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        text = str(value).strip()  # An int of thousands of digits is refused.
    except ValueError:
        return None
    return text if 0 < len(text) <= LONGEST else None


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # Exit handlers and threads of the program do not run.
