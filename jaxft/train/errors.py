"""Errors that end a run, their exit codes, and the error handling of a script's `main`."""

from __future__ import annotations

import importlib
import linecache
import multiprocessing
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax

from jaxft.generation import ServerError
from jaxft.output import OutputError
from jaxft.parallel import HostLostError, absent, several_hosts
from jaxft.rewards import RewardError, VerifierError
from jaxft.train.signals import catch_interrupts

BAD_INPUT, MISSING_DEPENDENCY, DIVERGED, HOST_LOST, PREEMPTED, INTERRUPTED = 2, 3, 4, 5, 75, 130
SMALLER = (
    "Try --remat full, fewer rows (--batch-size), --gradient-accumulation-steps, a shorter --max-length, "
    "--quantise nf4, or more shards (--fsdp)."
)
END_TOGETHER = 5.0  # seconds within which all hosts with the same failure have failed

IN_TRAINING = "in training, at step"  # begins the note that fit adds to errors of its loop
PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class DivergedError(ArithmeticError):
    """A loss or gradient is not finite: `step` is the bad step, `state` the state before it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        self.state = None  # TrainState after step - 1
        self.history = None  # rows up to step - 1


class PreemptedError(SystemExit):
    """A run that saves checkpoints got SIGTERM or SIGINT: its state is saved, and it can resume.

    The exit code is 75, which tells a scheduler to restart the run, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int = PREEMPTED):
        super().__init__(code)
        self.message = message

    def __str__(self):
        return self.message


class MissingDependencyError(ImportError):
    """An optional package that a callback needs is not installed."""


def require(module: str, what: str, extra: str) -> Any:
    """Imports a module; if it is missing, raises MissingDependencyError, which names `what` and the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingDependencyError(
            f"{what} needs {package}, which is not installed ({error}): pip install {package}, or "
            f"pip install 'jaxft[{extra}]'"
        ) from error


def run_main(main: Callable[[Any], Any], config: Any) -> Any:
    """Runs main(config); prints errors that users cause as one line and exits with their code.

    2: a bad argument, data or file before training, or at any time a path that cannot be written (a full
    disk), a server that fails, or a reward function or judge that does; 3: an optional package is missing;
    4: diverged; 5: another host ended; 75: preempted, saved; 130: interrupted, state saved if the run saves
    checkpoints. Any other error, and every error with `config.debug` or JAXFT_DEBUG=1, prints its traceback
    and exits with code 1.

    After Ctrl-C any error counts as Ctrl-C, because libraries may convert it. Ctrl-C ends the process
    without Python's own teardown, in which XLA threads that still compile or compute would crash. `main`
    has left its context managers by then; functions registered with `atexit` do not run.

    If one of several processes fails, it waits a moment for the others to fail too, reports which did not,
    and ends: the processes cannot continue without each other.
    """
    with catch_interrupts() as seen:
        if getattr(config, "debug", False) or os.environ.get("JAXFT_DEBUG", "0") not in ("", "0"):
            try:
                return main(config)
            except (KeyboardInterrupt, jax.errors.JaxRuntimeError) as error:
                if not _is_interrupt(error):
                    raise
                traceback.print_exception(error)
                _interrupted()
        try:
            return main(config)
        except PreemptedError as error:
            ended = "interrupted" if error.code == INTERRUPTED else "preempted"
            _exit(f"{ended}: {error}", error.code)
        except KeyboardInterrupt:
            _interrupted()
        except Exception as error:
            if seen():  # Libraries convert it to other errors while they are imported or called.
                _interrupted()
            _explain(error)


def _explain(error: Exception):
    """Ends the process with one line and the exit code of a user's error; raises any other error."""
    try:
        raise error
    except MissingDependencyError as error:
        _exit(f"error: {error}", MISSING_DEPENDENCY)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # A real import failure, not a missing extra of jaxft.
            raise
        _exit(f"error: {error}", MISSING_DEPENDENCY)
    except DivergedError as error:
        _exit(f"error: {error}", DIVERGED)
    except (OutputError, RewardError, ServerError, VerifierError) as error:
        _exit(f"error: {error}", BAD_INPUT)
    except (ValueError, OSError) as error:
        if any(note.startswith(IN_TRAINING) for note in getattr(error, "__notes__", ())):
            _raise(error)
        _exit(f"error: {error}", BAD_INPUT)
    except MemoryError as error:
        _exit(f"error: out of memory: {error}. {SMALLER}", BAD_INPUT)
    except HostLostError as error:
        _exit(f"error: {error}", HOST_LOST)
    except jax.errors.JaxRuntimeError as error:
        if _is_interrupt(error):
            _interrupted()
        first = str(error).strip().split("\n")[0][:300]
        if "RESOURCE_EXHAUSTED" in first:
            _exit(f"error: out of memory: {first}. {SMALLER}", BAD_INPUT)
        if not several_hosts():
            raise
        _exit(
            f"error: a computation of all hosts failed, as when one of them ends: {first}",
            HOST_LOST,
        )
    except Exception as error:
        _raise(error)


def is_refusal(error: BaseException) -> bool:
    """Returns whether `error` is a ValueError of a `raise` in jaxft: an input that it refuses.

    JAX and NumPy raise ValueErrors too; those that come from an objective are errors of its code.
    """
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = frame.f_code.co_filename
    raises = linecache.getline(file, line).lstrip().startswith("raise ")
    return raises and PACKAGE in pathlib.Path(file).parents


def _raise(error: Exception):
    """Prints the traceback and exits with code 1; does not wait for other processes."""
    if several_hosts():
        traceback.print_exception(error)
        _leave(1)
    raise error


def _is_interrupt(error: BaseException) -> bool:
    """Returns whether `error` is Ctrl-C: in a host callback, XLA wraps its traceback's text in an error."""
    if isinstance(error, KeyboardInterrupt):
        return True
    return str(error).rstrip().split("\n")[-1].strip(": ") == "KeyboardInterrupt"


def _interrupted():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C would print a traceback here
    print("interrupted", file=sys.stderr)
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(INTERRUPTED)


def _exit(message: str, code: int):
    line = " ".join(message.split())
    hint = "" if code in (PREEMPTED, INTERRUPTED) else " (JAXFT_DEBUG=1 shows where)"
    print(line + hint, file=sys.stderr, flush=True)
    if code not in (PREEMPTED, INTERRUPTED) and several_hosts():
        _leave(code)
    raise SystemExit(code)


def _leave(code: int):
    """Ends this process at once if the others do not end too: jax.distributed would wait for them."""
    if lost := absent("end", END_TOGETHER):
        numbers = ", ".join(map(str, lost))
        print(
            f"process {numbers} did not end with this one; look at its output too", file=sys.stderr
        )
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
