"""Calls in processes of their own, which may hang, raise or die: verifiers above all."""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import multiprocessing
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np

from jaxft.parallel import first_decides
from jaxft.rewards.checked import checked_reward, checked_rewards, shown
from jaxft.rewards.verifiers import Verifier

STARTUP = 120.0  # seconds that a process may take to import and to make its verifier
_UNGUARDED = 78  # exit status of a process that came back to here while it imported the script

# (completions, records) -> one reward each; NaN where there is no verdict.
RewardFn = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]


class VerifierError(RuntimeError):
    """Too many verdicts failed, or no process can make its function."""


class Failures(NamedTuple):
    """How many calls of a pool failed so far, and why."""

    timeouts: int = 0
    errors: int = 0  # exceptions
    deaths: int = 0


def in_process(verifier: Verifier) -> RewardFn:
    """Rewards of a verifier that is trusted to return: 1 for right, 0 for wrong, or its own numbers.

    Raises:
        RewardError: when called, for a verdict that is no number.
    """
    return lambda completions, records: [
        checked_reward(verifier(completion, record))
        for completion, record in zip(completions, records, strict=True)
    ]


class OnFirstHost:
    """A RewardFn that the first process calls for all: verdicts of a pool depend on its clock.

    `failures` are those of the function, if it counts them.
    """

    def __init__(self, rewards: RewardFn | None):
        self._rewards = rewards

    @property
    def failures(self) -> Failures:
        """How many calls failed so far, here."""
        return getattr(self._rewards, "failures", Failures())

    def __call__(self, completions, records):
        """A reward each; NaN where there is no verdict.

        Raises:
            RewardError: for what is no reward.
        """

        def call():
            values = checked_rewards(self._rewards(completions, records), len(completions))
            return [None if np.isnan(value) else float(value) for value in values]

        values = first_decides(call)
        return np.array([np.nan if value is None else value for value in values], float)


class Outcome(NamedTuple):
    """What a call in another process came to."""

    value: Any = None  # or, of an exception, its message
    failure: str | None = None  # a field of Failures
    place: str = ""  # of an exception, the file and line that raised it


class ProcessPool:
    """Calls of a function in `workers` processes, each within `timeout` seconds.

    A call that takes longer costs its process, which is killed and replaced. Processes are spawned, not
    forked (JAX has threads), so each imports the script: a script needs its `if __name__ == "__main__"`,
    and a notebook takes the function from a module.

    Args:
        make_function: called once in each process: a function of a module, or a functools.partial of one.
            What it makes takes and gives what can be pickled.
        timeout: wall-clock seconds of one call.

    Raises:
        ValueError: if a process could not import the function: one of a notebook, or of standard input.
        VerifierError: in the first call, if the script starts its work when it is imported.
    """

    def __init__(
        self,
        make_function: Callable[[], Callable[..., Any]],
        *,
        workers: int = 2,
        timeout: float = 5.0,
    ):
        if workers < 1 or timeout <= 0:
            raise ValueError(
                f"ProcessPool: needs workers >= 1 and timeout > 0, got {workers} and {timeout}."
            )
        _check_importable(make_function)
        self._make, self._timeout = make_function, timeout
        self._workers = [_Worker(make_function) for _ in range(workers)]

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, arguments: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """The outcome of each call, in their order."""
        jobs = collections.deque(enumerate(arguments))
        outcomes = [Outcome()] * len(jobs)
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
                outcomes[job] = outcome
                if worker.dead:
                    self._workers[i] = _Worker(self._make)
        return outcomes

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()


class VerifierPool:
    """Rewards of a verifier in a `ProcessPool`.

    A verdict that takes too long, raises or is no number (`checked_reward`), or whose process dies, is a
    failure. The first of each kind is shown on standard error, with the completion. A failure's reward is
    `failed`: by default NaN, no verdict, so that the response is in no baseline and gets no advantage; 0
    teaches to avoid what breaks the verifier.

        with VerifierPool(functools.partial(reasoning_gym_verifier, "rg:chain_sum")) as rewards:
            rewards(completions, records)

    Args:
        make_verifier, workers, timeout: see `ProcessPool`.
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
        self.failures = Failures()
        self._shown: set[str] = set()  # kinds of failures of which the first was shown
        self._failed, self._max_failed = failed, max_failed
        make = functools.partial(_numbers, make_verifier)
        self._pool = ProcessPool(make, workers=workers, timeout=timeout)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(
        self, completions: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Rewards [B] in the order of the completions."""
        outcomes = self._pool(list(zip(completions, records, strict=True)))
        failed = collections.Counter(o.failure for o in outcomes if o.failure)
        self.failures = Failures(*(n + failed[k] for k, n in self.failures._asdict().items()))
        pairs = zip(outcomes, completions, strict=True)
        said = [(outcome.failure, _said(*pair)) for pair in pairs if (outcome := pair[0]).failure]
        for kind, text in said:
            if kind not in self._shown:
                self._shown.add(kind)
                print(
                    f"verdict failed: {text}; more like it are counted", file=sys.stderr, flush=True
                )
        count = sum(failed.values())
        if count > self._max_failed * len(outcomes):
            raise VerifierError(
                f"{count} of {len(outcomes)} verdicts failed ({dict(failed)}), the first with: {said[0][1]}; "
                "try the verifier on one completion by hand, or raise max_failed."
            )
        values = [self._failed if o.failure else o.value for o in outcomes]
        return np.array(values, np.float64)

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()


def _said(outcome, completion):
    """What failed, and on which completion, on one line."""
    what = {"timeouts": "no verdict in time", "deaths": "its process died"}
    said = what.get(outcome.failure) or f"{outcome.value} {outcome.place}".strip()
    return " ".join(f"{said}, on the completion {shown(completion)}".split())


def _check_importable(make_function):
    """Refuses what a new process, which has only files to import from, could not find."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # python -m
        return
    file = getattr(main, "__file__", None)
    if file is not None and not pathlib.Path(file).exists():
        raise ValueError(
            f"ProcessPool: the program comes from {file}, which its processes cannot import; write it to a "
            "file, or use in_process for a verifier that is trusted to return."
        )
    if file is None and _is_of_main(make_function):
        raise ValueError(
            "ProcessPool: the function is defined in a notebook or at a prompt, where its processes cannot "
            "import it; write it to a .py file and import it from there, or use in_process for a verifier "
            "that is trusted to return."
        )


def _is_of_main(value):
    if isinstance(value, functools.partial):
        return any(map(_is_of_main, (value.func, *value.args, *value.keywords.values())))
    return getattr(value, "__module__", None) == "__main__"


def _numbers(make_verifier):
    """The verifier, its verdicts made numbers where what is none can still be counted as an error."""
    verifier = make_verifier()
    return lambda completion, record: checked_reward(verifier(completion, record))


class _Worker:
    """One process and the call it is at: at most one."""

    def __init__(self, make_function):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_function), daemon=True)
        try:
            with _interrupts_blocked():
                self._process.start()
        except RuntimeError as error:
            if "bootstrapping" not in str(error):
                raise
            # This is such a process itself, still importing a script without a guard: the script's own
            # process reports it (`_fail`).
            raise SystemExit(_UNGUARDED) from None
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
        """(job, outcome; None: it has just become ready)."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            return self._fail("deaths")
        if not self.ready:
            if message is not None:
                self.kill()
                raise VerifierError(f"the function cannot be made in its process: {message}")
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
        if kind == "deaths":
            self._process.join(1.0)  # Its own exit status, not that of `kill`.
        self.kill()
        if self._process.exitcode == _UNGUARDED:
            raise VerifierError(
                f"{sys.modules['__main__'].__file__} starts its work when it is imported, and each process "
                "of a pool imports it; put its start under if __name__ == '__main__':, or use in_process "
                "for a verifier that is trusted to return."
            ) from None
        if not self.ready:
            raise VerifierError(
                f"a process ended or hung before its first call ({kind}); is what makes the function "
                "importable, and the script's start under if __name__ == '__main__'?"
            ) from None
        return self.job, Outcome(failure=kind)


@contextlib.contextmanager
def _interrupts_blocked():
    """A process that is started inside never sees SIGINT, which reaches all processes of a terminal.

    Its parent ends it. Here a SIGINT waits until the block is left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe, make_function):
    # What a function prints goes to the output of the script, and a process that is killed flushes nothing.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    try:
        function = make_function()
    except Exception as error:
        pipe.send(" ".join(filter(None, (repr(error), _failed(error).place))))
        return
    pipe.send(None)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            outcome = Outcome(function(*arguments))
        except Exception as error:
            outcome = _failed(error)
        sys.stdout.flush()
        try:
            pipe.send(outcome)
        except Exception as error:  # Its value cannot be pickled.
            pipe.send(_failed(error))


def _failed(error):
    """The outcome of a call that raised, with the place in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, inspect.getsourcefile(checked_reward))
    own = [f for f in frames if "site-packages" not in f.filename and f.filename not in ours]
    place = f"({pathlib.Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return Outcome(repr(error), "errors", place)
