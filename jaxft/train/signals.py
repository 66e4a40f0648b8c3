"""Preemption: SIGTERM and the first SIGINT end a run after its current step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def catch_preemption() -> Iterator[Callable[[int], str | None]]:
    """Gives preempted(step) -> name of the signal that asks to stop, or None.

    A second SIGINT interrupts at once. Handlers are set in the main thread only and put back at
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
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
