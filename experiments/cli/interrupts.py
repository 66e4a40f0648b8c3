"""Ctrl-C while a script is imported, reads its flags or ends: one line and exit code 130, no traceback.

A script imports this module first, because its other imports take seconds. From `run_main` on, Ctrl-C is a
KeyboardInterrupt, so that files are closed and processes are ended. The module does nothing unless a running
script imports it.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from typing import Any

from experiments.cli import quiet

INTERRUPTED = 130
EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]


def runs_a_script(main: Any) -> bool:
    """Returns whether `main`, the module __main__, is a running script of experiments/."""
    file = getattr(main, "__file__", None)
    return file is not None and EXPERIMENTS in pathlib.Path(file).resolve().parents


def end(number: int, frame: Any) -> None:
    """Ends the process at once: the handler of SIGINT."""
    del number, frame
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


if runs_a_script(sys.modules["__main__"]):
    quiet.silence()
# Not if SIGINT is ignored: a shell starts background jobs that way.
if (
    runs_a_script(sys.modules["__main__"])
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, end)
