"""Signals: SIGTERM and the first SIGINT end a run after its current step; Ctrl-C outside a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def catch_preemption() -> Iterator[Callable[[int], str | None]]:
    """Yields preempted(step) -> name of the signal that asks to stop, or None.

    A second SIGINT interrupts at once. Handlers are set only in the main thread and restored at
    the end. In a run of several processes jax.distributed watches for SIGTERM, and all processes agree
    on the step after which they stop.
    """
    if jax.process_count() > 1:
        yield (
            lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        )
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return

    caught = []

    def handle(number, frame):
        del frame
        caught.append(signal.Signals(number).name)
        again = "; Ctrl-C once more ends it at once" if number == signal.SIGINT else ""
        # os.write instead of print: a signal may arrive during a print. On a terminal the cursor is at the
        # end of the progress bar.
        start = "\n" if os.isatty(2) else ""
        text = f"{start}{caught[-1]}: the run stops and is saved after this step{again}\n"
        os.write(2, text.encode())
        interrupts = callable(before[signal.SIGINT])
        signal.signal(
            signal.SIGINT, before[signal.SIGINT] if interrupts else signal.default_int_handler
        )

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield lambda step: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def catch_interrupts() -> Iterator[Callable[[], bool]]:
    """Yields seen() -> whether a SIGINT arrived; each raises KeyboardInterrupt inside the block.

    The handler is set only in the main thread and restored at the end. It is not set if SIGINT is ignored,
    as in a background job.
    """
    seen = []

    def handle(number, frame):
        seen.append(True)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before in (signal.SIG_IGN, None):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
