"""Runs calls that may hang, raise or die, mainly verifiers, in separate processes."""

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

STARTUP = 120.0  # seconds for a process to import and to make its verifier
_UNGUARDED = 78  # exit status of a process that made a pool while it imported the script

# (completions, records) -> one reward each; NaN where there is no verdict.
RewardFn = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]


class VerifierError(RuntimeError):
    """Too many verdicts failed, or a process cannot make its function."""


class Failures(NamedTuple):
    """Numbers of calls of a pool that failed so far, by cause."""

    timeouts: int = 0
    errors: int = 0  # exceptions
    deaths: int = 0


def in_process(verifier: Verifier) -> RewardFn:
    """Rewards of a verifier that is trusted to return: 1 for right, 0 for wrong, or the verifier's numbers.

    Raises:
        RewardError: when called, for a verdict that is not a number.
    """
    return lambda completions, records: [
        checked_reward(verifier(completion, record))
        for completion, record in zip(completions, records, strict=True)
    ]


class OnFirstHost:
    """A RewardFn that the first process calls for all: verdicts of a pool depend on its clock.

    `failures` are the function's, if it counts them.
    """

    def __init__(self, rewards: RewardFn | None):
        self._rewards = rewards

    @property
    def failures(self) -> Failures:
        """Numbers of calls that failed so far in this process."""
        return getattr(self._rewards, "failures", Failures())

    def __call__(self, completions, records):
        """One reward per completion; NaN where there is no verdict.

        Raises:
            RewardError: for a result that is not a reward.
        """

        def call():
            values = checked_rewards(self._rewards(completions, records), len(completions))
            return [None if np.isnan(value) else float(value) for value in values]

        values = first_decides(call)
        return np.array([np.nan if value is None else value for value in values], float)


class Outcome(NamedTuple):
    """The result of a call in another process."""

    value: Any = None  # for an exception, its message
    failure: str | None = None  # a field of Failures
    place: str = ""  # for an exception, the file and line that raised it


class ProcessPool:
    """Calls of a function in `workers` processes, each within `timeout` seconds.

    If a call takes longer, its process is killed and replaced. Processes are spawned, not forked
    (JAX has threads), so each imports the script: a script needs `if __name__ == "__main__"`, and a
    notebook must import the function from a module.

    Args:
        make_function: called once in each process: a function of a module, or a functools.partial of one.
            The arguments and results of the function that it makes must be picklable.
        timeout: wall-clock seconds of one call.

    Raises:
        ValueError: if a process could not import the function: one from a notebook or from standard
            input.
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
        """The outcome of each call, in order."""
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

    A verdict is a failure if it takes too long, raises, is not a number (`checked_reward`), or its
    process dies. The first of each kind is printed on standard error, with the completion. A
    failure's reward is `failed`: by default NaN, no verdict, so that the response is in no baseline
    and gets no advantage; 0 trains the policy to avoid texts that break the verifier.

        with VerifierPool(functools.partial(reasoning_gym_verifier, "rg:chain_sum")) as rewards:
            rewards(completions, records)

    Args:
        make_verifier, workers, timeout: see `ProcessPool`.
        max_failed: share of failures in one call above which VerifierError is raised.
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
        self._shown: set[str] = set()  # kinds of failures already shown once
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
                    f"verdict failed: {text}; others are only counted", file=sys.stderr, flush=True
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
    """The failure and its completion, on one line."""
    what = {"timeouts": "no verdict in time", "deaths": "its process died"}
    said = what.get(outcome.failure) or f"{outcome.value} {outcome.place}".strip()
    return " ".join(f"{said}, on the completion {shown(completion)}".split())


def _check_importable(make_function):
    """Raises ValueError for functions that a new process, which imports from files, could not find."""
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
    """The verifier with verdicts as numbers, checked where a bad one still counts as an error."""
    verifier = make_verifier()
    return lambda completion, record: checked_reward(verifier(completion, record))


class _Worker:
    """One process and its current call, at most one."""

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
            # This is itself a process of a pool, still importing a script without a guard: the
            # script's main process reports it (`_fail`).
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
            pass  # `listen` will notice its end.

    def listen(self):
        """(job, outcome), or (None, None) if the process has just become ready."""
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
        """`listen` for a process that sent nothing: (None, None) before its deadline, then a failure."""
        return (None, None) if time.monotonic() < self.deadline else self._fail("timeouts")

    def kill(self):
        self.dead = True
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _fail(self, kind):
        if kind == "deaths":
            self._process.join(1.0)  # To get its own exit status, not that of `kill`.
        self.kill()
        if self._process.exitcode == _UNGUARDED:
            raise VerifierError(
                f"{sys.modules['__main__'].__file__} starts its work when it is imported, and each process "
                "of a pool imports it; put its start under if __name__ == '__main__':, or use in_process "
                "for a verifier that is trusted to return."
            ) from None
        if not self.ready:
            raise VerifierError(
                f"a process ended or hung before its first call ({kind}); check that the function's maker "
                "can be imported, and that the script starts under if __name__ == '__main__'."
            ) from None
        return self.job, Outcome(failure=kind)


@contextlib.contextmanager
def _interrupts_blocked():
    """Blocks SIGINT, which a terminal sends to all its processes, in processes started inside.

    Their parent ends them. In this process a SIGINT waits until the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe, make_function):
    # A function prints to the script's output, and a killed process flushes nothing.
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
        except Exception as error:  # The value cannot be pickled.
            pipe.send(_failed(error))


def _failed(error):
    """The outcome of a call that raised, with the line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, inspect.getsourcefile(checked_reward))
    own = [f for f in frames if "site-packages" not in f.filename and f.filename not in ours]
    place = f"({pathlib.Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return Outcome(repr(error), "errors", place)
