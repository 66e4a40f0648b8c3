"""A thread that samples rollouts ahead of training, from params that are at most some rollouts old.

It is the source of `collect(..., max_staleness=N)`. A version is the number of rollouts that were trained
on: params of version v are those before the first step on rollout v. Rollout r may start once the newest
version is at least r - N, so that it is trained on at most N rollouts after its params.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import overwritten
from jaxft.keys import stream
from jaxft.rl.rollouts import Batch

GRACE = 2.0  # seconds that `close` waits for a rollout that is being sampled


class Place(NamedTuple):
    """Position of a run: the next draw of prompts and the next rollout."""

    draws: int
    rollouts: int


# (params, first draw of prompts, key) -> (batch, number of draws taken)
Draw = Callable[[Any, int, jax.Array], tuple[Batch, int]]


class Sampled(NamedTuple):
    """A rollout before its transforms and credit."""

    batch: Batch
    place: Place
    taken: int  # draws of prompts
    version: int  # of the params that sampled it
    waited: float  # seconds that the sampler waited for a version that is new enough


def snapshot(params: Any) -> Any:
    """Copies the arrays that a training step overwrites, on their devices; frozen arrays are shared."""
    mask = overwritten(params)
    return jax.tree.map(lambda changes, x: jnp.copy(x) if changes else x, mask, params)


class Ahead:
    """Samples rollouts in a thread, in the order of their draws, each with the newest params.

    The carry of the run decides which rollout is next: if it is not the one that the thread sampled (a
    resumed run, another run of the same collector), everything sampled so far is discarded and sampled
    again from that place. The thread starts at the first `take` and ends by `close`, at an error or after
    the last rollout.

    Args:
        draw: the sampler; only the thread calls it.
        max_staleness: N, at least 1.
        rollouts: number of rollouts of the run; None: unknown, up to N are sampled in vain at its end.
    """

    def __init__(self, draw: Draw, max_staleness: int, rollouts: int | None = None):
        self._draw, self._most, self._last = draw, max_staleness, rollouts
        self._changed = threading.Condition()
        self._thread = None
        self._forget(Place(0, 0))

    def take(self, params: Any, place: Place, key: jax.Array) -> tuple[Sampled, dict[str, float]]:
        """Returns the rollout at `place` and metrics: trainer_wait, sampler_wait [s], dropped [rollouts].

        Rollouts whose tokens are all too old, as reported by the sampler's `policy_version`, are dropped
        and their prompts are sampled again with `params`.

        Raises:
            ValueError: for a rollout beyond `rollouts`.
            RuntimeError: if tokens are too old although `params` were the newest.
            Exception: whatever the sampler raised in the thread.
        """
        if self._last is not None and place.rollouts >= self._last:
            raise ValueError(f"collect: rollouts={self._last}, but the run asks for another one.")
        began, dropped = time.perf_counter(), 0
        params = snapshot(params)
        while True:
            found = self._next(params, place, key)
            if np.any(_usable(found, place.rollouts, self._most)):
                break
            if found.version == place.rollouts:
                raise RuntimeError(
                    f"collect: the sampler reports policy_version {int(_versions(found).max())} for "
                    f"samples of version {found.version}, and max_staleness is {self._most}; do new weights "
                    "reach it?"
                )
            # Later rollouts are not newer, and follow the draws that are repeated.
            with self._changed:
                dropped += 1 + len(self._ready)
                self._forget(place)
        waits = {
            "trainer_wait": time.perf_counter() - began,
            "sampler_wait": found.waited,
            "dropped": float(dropped),
        }
        return found, waits

    def close(self) -> None:
        """Ends the thread; what it is sampling is discarded.

        A call of the sampler cannot be interrupted: if it lasts longer than GRACE, the thread ends with it.
        """
        with self._changed:
            thread, self._thread = self._thread, None
            self._forget(Place(0, 0))
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(GRACE)

    def _forget(self, place):
        """Discards what was sampled; the next rollout to take and to sample is that at `place`."""
        self._ready, self._error = collections.deque(), None
        self._taking = self._sampling = place
        self._params = self._version = self._key = None
        # Identifies the rollouts of this start: one that is being sampled now is discarded.
        self._start = object()

    def _next(self, params, place, key):
        with self._changed:
            if place != self._taking:
                self._forget(place)
            self._params, self._version, self._key = params, place.rollouts, key
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            if not self._ready:
                error, self._thread = self._error, None
                self._forget(place)
                raise error
            found = self._ready.popleft()
            self._taking = _after(found.place, found.taken)
            self._changed.notify_all()
        return found

    def _run(self):
        thread = threading.current_thread()
        while True:
            began = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: self._thread is not thread or self._may_start())
                if self._thread is not thread:
                    return
                start, place, version = self._start, self._sampling, self._version
                params, key = self._params, stream(self._key, "ahead", place.rollouts)
            waited = time.perf_counter() - began
            try:
                batch, taken = self._draw(params, place.draws, key)
            except BaseException as error:
                with self._changed:
                    if self._thread is thread:
                        self._error = error
                        self._changed.notify_all()
                return
            del params  # Else the thread would hold old params while it waits.
            with self._changed:
                if start is self._start:
                    self._ready.append(Sampled(batch, place, taken, version, waited))
                    self._sampling = _after(place, taken)
                    self._changed.notify_all()

    def _may_start(self):
        if self._params is None:
            return False
        number = self._sampling.rollouts
        return number - self._version <= self._most and (self._last is None or number < self._last)


def aged(
    found: Sampled, now: int, max_staleness: int, waits: dict[str, float]
) -> tuple[Batch, np.ndarray]:
    """Returns the batch with `policy_version` and stats, and which tokens [B, N] are new enough for the loss.

    Tokens that are too old are of the response for transforms and credit (lengths, penalties, baselines),
    and leave the loss afterwards. Stats, each [B]: `staleness` (mean over the row's own tokens, in
    rollouts), `staleness_max` (over the rollout), `stale_tokens` (share that leaves the loss), and `waits`.

    Args:
        now: the version of the params that train on the rollout.
    """
    batch, mask = found.batch, np.asarray(found.batch["completion_mask"], bool)
    rows, ages = len(mask), _ages(found, now)
    own = np.maximum(mask.sum(axis=1), 1)
    fresh = mask & (ages <= max_staleness)
    stats = {
        "staleness": np.sum(ages, axis=1, where=mask) / own,
        "staleness_max": np.full(rows, ages[mask].max(initial=0)),
        "stale_tokens": (mask & ~fresh).sum(axis=1) / own,
    } | {name: np.full(rows, value) for name, value in waits.items()}
    stats = batch.get("stats", {}) | {n: x.astype(np.float32) for n, x in stats.items()}
    return batch | {"policy_version": _versions(found), "stats": stats}, ages <= max_staleness


def _usable(found, now, most):
    """Returns which rows [B] have a token of the policy that is not too old; all, if none has a token."""
    mask = np.asarray(found.batch["completion_mask"], bool)
    return np.any(mask & (_ages(found, now) <= most), axis=1) | ~mask.any()


def _ages(found, now):
    """Returns the rollouts between the policy that sampled each token and that of `now`, [B, N]."""
    ages = now - _versions(found)
    shape = np.shape(found.batch["completion_mask"])
    return np.broadcast_to(ages[:, None] if ages.ndim == 1 else ages, shape)


def _versions(found):
    """Returns the versions [B] or [B, N] that the sampler reports, else that of the rollout [B]."""
    mask = found.batch["completion_mask"]
    versions = found.batch.get("policy_version")
    if versions is None:
        return np.full(len(mask), found.version, np.int32)
    versions = np.asarray(versions)
    if (
        versions.shape not in (np.shape(mask)[:1], np.shape(mask))
        or versions.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"collect: policy_version must be whole numbers [B] or [B, N] like completion_mask "
            f"{list(np.shape(mask))}, got {versions.dtype} {list(versions.shape)}."
        )
    return versions.astype(np.int32)


def _after(place, taken):
    return Place(place.draws + taken, place.rollouts + 1)
