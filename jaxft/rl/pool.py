"""Rewards from verifiers in processes of their own, which may hang, raise or die."""

from __future__ import annotations

import collections
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np

from jaxft.rl.verifiers import Verifier

STARTUP = 120.0  # seconds that a process may take to import and to make its verifier

# (completions, records) -> one reward each; NaN where there is no verdict.
RewardFn = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]


class VerifierError(RuntimeError):
    """Too many verdicts failed, or no process can make its verifier."""


class Failures(NamedTuple):
    """How many verdicts of a pool failed so far, and why."""

    timeouts: int = 0
    errors: int = 0  # exceptions
    deaths: int = 0


def in_process(verifier: Verifier) -> RewardFn:
    """Rewards of a verifier that is trusted to return: 1 for right, 0 for wrong, or its own numbers."""
    return lambda completions, records: [
        float(verifier(completion, record))
        for completion, record in zip(completions, records, strict=True)
    ]


class VerifierPool:
    """Rewards of a verifier that runs in `workers` processes, each verdict within `timeout` seconds.

    A verdict that takes longer costs its process, which is killed and replaced; one that raises, or whose
    process dies, is a failure too. A failure's reward is `failed`: by default NaN, no verdict, so that the
    response is in no baseline and gets no advantage; 0 teaches to avoid what breaks the verifier.

        with VerifierPool(functools.partial(reasoning_gym_verifier, "rg:chain_sum")) as rewards:
            rewards(completions, records)

    Processes are spawned, not forked (JAX has threads), so a script needs its `if __name__ == "__main__"`.

    Args:
        make_verifier: called once in each process: a function of a module, or a functools.partial of one.
        timeout: wall-clock seconds of one verdict.
        max_failed: share of failures in one call above which it raises.
    """

    def __init__(
        self,
        make_verifier: Callable[[], Verifier],
        *,
        workers: int = 2,
        timeout: float = 5.0,
        failed: float = float("nan"),
        max_failed: float = 0.5,
    ):
        if workers < 1 or timeout <= 0:
            raise ValueError(
                f"VerifierPool: needs workers >= 1 and timeout > 0, got {workers} and {timeout}."
            )
        self.failures = Failures()
        self._make, self._timeout = make_verifier, timeout
        self._failed, self._max_failed = failed, max_failed
        self._workers = [_Worker(make_verifier) for _ in range(workers)]

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(
        self, completions: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Rewards [B] in the order of the completions."""
        jobs = collections.deque(enumerate(zip(completions, records, strict=True)))
        rewards = np.full(len(jobs), self._failed, np.float64)
        failed = collections.Counter()
        while jobs or any(worker.job is not None for worker in self._workers):
            for worker in self._workers:
                if worker.ready and worker.job is None and jobs:
                    worker.give(*jobs.popleft(), self._timeout)
            waits = {w.pipe: i for i, w in enumerate(self._workers) if not w.idle}
            until = min(self._workers[i].deadline for i in waits.values())
            heard = connection.wait(list(waits), max(0.0, until - time.monotonic()))
            for i in waits.values():
                worker = self._workers[i]
                job, outcome = worker.listen() if worker.pipe in heard else worker.check()
                if outcome is None:
                    continue
                if isinstance(outcome, float):
                    rewards[job] = outcome
                else:
                    failed[outcome] += 1
                    if worker.dead:
                        self._workers[i] = _Worker(self._make)
        self.failures = Failures(*(n + failed[k] for k, n in self.failures._asdict().items()))
        count = sum(failed.values())
        if count > self._max_failed * len(rewards):
            raise VerifierError(
                f"{count} of {len(rewards)} verdicts failed ({dict(failed)}); try the verifier on one "
                "completion by hand, or raise max_failed."
            )
        return rewards

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()


class _Worker:
    """One process and the verdict it is at: at most one."""

    def __init__(self, make_verifier):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_verifier), daemon=True)
        self._process.start()
        theirs.close()
        self.ready, self.dead, self.job = False, False, None
        self.deadline = time.monotonic() + STARTUP

    @property
    def idle(self):
        return self.ready and self.job is None

    def give(self, job, arguments, timeout):
        self.job, self.deadline = job, time.monotonic() + timeout
        try:
            self.pipe.send(arguments)
        except (BrokenPipeError, ConnectionResetError):
            pass  # Its end shows when it is listened to.

    def listen(self):
        """(job, reward or kind of failure; None: it has just become ready)."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            return self._fail("deaths")
        if not self.ready:
            if message is not None:
                self.kill()
                raise VerifierError(f"the verifier cannot be made in its process: {message}")
            self.ready = True
            return None, None
        job, self.job = self.job, None
        return job, message

    def check(self):
        """As `listen`, of a process that says nothing."""
        return (None, None) if time.monotonic() < self.deadline else self._fail("timeouts")

    def kill(self):
        self.dead = True
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _fail(self, kind):
        self.kill()
        if not self.ready:
            raise VerifierError(
                f"a verifier's process ended or hung before its first verdict ({kind}); is what makes "
                "the verifier importable, and the script's start under if __name__ == '__main__'?"
            )
        return self.job, kind


def _serve(pipe, make_verifier):
    try:
        verifier = make_verifier()
    except Exception as error:
        pipe.send(repr(error))
        return
    pipe.send(None)
    while True:
        try:
            completion, record = pipe.recv()
        except EOFError:
            return
        try:
            reward = float(verifier(completion, record))
        except Exception:
            reward = "errors"
        pipe.send(reward)
