"""Runs on several hosts: start-up, values gathered from all, files that one of them writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft.output import writing

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Each launcher gives the number of processes in its own variable.
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def connect_hosts(distributed: bool = False, *, timeout: int = 300) -> bool:
    """Joins this process with those on the other hosts, if there are any; True if it did.

    Call it before any other use of JAX. It acts only if JAX_NUM_PROCESSES is set (then with
    JAX_COORDINATOR_ADDRESS, host:port of process 0, and JAX_PROCESS_ID), under SLURM or Open MPI
    with more than one task, or if `distributed` is True: on Cloud TPU slices and Kubernetes, where
    jax.distributed finds the others by itself.

    Args:
        distributed: True if this is one of several hosts.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: for an incomplete set of variables.
        RuntimeError: if the others do not connect in time.
    """
    options = _options(os.environ)
    if options is None and not distributed:
        return False
    options = options or {}
    try:
        jax.distributed.initialize(initialization_timeout=timeout, **options)
    except Exception as error:
        who = (
            f"process {options['process_id']} of {options['num_processes']}"
            if options
            else "this process"
        )
        where = f" at {options['coordinator_address']}" if options else ""
        raise RuntimeError(
            f"{who} did not reach the others{where} within {timeout} s: {error}. Every host must start the "
            "same command at about the same time, and reach process 0 on that port."
        ) from error
    return True


class HostLostError(RuntimeError):
    """Another process of the run did not reach a barrier."""


def several_hosts() -> bool:
    """True if this process has joined others; unlike jax.process_count(), it starts no backend."""
    return jax.distributed.is_initialized() and (_joined().num_processes or 1) > 1


def absent(place: str, timeout: float) -> list[int]:
    """Waits until all processes are at `place`; returns the numbers of those that did not arrive in time.

    Args:
        place: a name that each process uses once.
        timeout: seconds.
    """
    joined = _joined()
    client, count = joined.client, joined.num_processes
    prefix = f"jaxft/{place}/"
    try:
        client.key_value_set(f"{prefix}{joined.process_id}", "here")
        client.wait_at_barrier(prefix, int(timeout * 1000))
        return []
    except jax.errors.JaxRuntimeError:
        pass
    try:
        came = {int(key.removeprefix(prefix)) for key, _ in client.key_value_dir_get(prefix)}
    except jax.errors.JaxRuntimeError:  # Process 0 keeps the list.
        return [0]
    return sorted(set(range(count)) - came)


def meet(place: str, timeout: float = 600) -> None:
    """Waits until all processes are at `place` (see `absent`); does nothing in a single process.

    Raises:
        HostLostError: naming those that did not arrive within `timeout` seconds.
    """
    if several_hosts() and (lost := absent(place, timeout)):
        numbers, count = ", ".join(map(str, lost)), _joined().num_processes
        raise HostLostError(
            f"{place}: process {numbers} of {count} did not arrive within {timeout:g} s. Look at its output "
            "first, then start all of them again with --resume."
        )


def to_host(tree: Any) -> Any:
    """The tree with whole NumPy arrays as leaves, gathered across processes: all must call it."""

    def whole(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return multihost_utils.process_allgather(leaf, tiled=True)

    # All copies are started before the first is awaited.
    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(whole, tree)))


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, after a round trip through JSON, as a list in every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes, strict=True)]


def first_decides(call: Callable[[], Any]) -> Any:
    """Runs `call` only in the first process and returns its result, as JSON has it, in all of them.

    Raises:
        RuntimeError: in the other processes, if `call` failed in the first, which raises its own
            error.
    """
    if jax.process_count() == 1:
        return call()
    value, failure = {}, None
    if jax.process_index() == 0:
        try:
            value = {"value": call()}
        except Exception as error:  # Any error: the other processes wait for the outcome.
            failure = error
    word = gathered(value)[0]
    if failure is not None:
        raise failure
    if "value" not in word:
        raise RuntimeError("process 0 failed in a step for all; its own message says why.")
    return word["value"]


def written_once(write: Callable[[], None], what: str, parts: Iterable[Any] = ()) -> None:
    """Calls `write` only in the first process; the others wait until it is done.

    Args:
        write: must not call functions that need all processes, but may take from `parts`.
        what: the path, named in errors.
        parts: an iterator that gathers values from all processes as it goes; all run to its end.

    Raises:
        RuntimeError: in the other processes, if `write` failed in the first, which raises its own
            error: an OutputError if, for example, the disk is full.
    """
    if jax.process_count() == 1:
        with writing(what):
            write()
        return
    failure = None
    if jax.process_index() == 0:
        try:
            with writing(what):
                write()
        except Exception as error:  # Any error: the other processes wait for the outcome.
            failure = error
    for _ in parts:
        pass
    done = multihost_utils.broadcast_one_to_all(np.array(failure is None))
    if failure is not None:
        raise failure
    if not done:
        raise RuntimeError(f"process 0 could not write {what}; its own message says why.")


def _joined():
    """The client, number and count of processes of jax.distributed, which has no public names for them.

    A barrier that names the absent processes needs the client. Runs of one process never call this.
    """
    from jax._src import distributed

    return distributed.global_state


def _options(environment: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize; {} if it finds them itself, None for one process."""
    given = [name for name in _BY_HAND if environment.get(name)]
    if not given or given == ["JAX_COORDINATOR_ADDRESS"]:
        several = any(int(environment.get(name) or 1) > 1 for name in _LAUNCHERS)
        return {} if several else None
    if missing := [name for name in _BY_HAND if name not in given]:
        raise ValueError(
            f"{', '.join(given)} is set, {', '.join(missing)} is not; set all three or none."
        )
    address, count, number = (environment[name] for name in _BY_HAND)
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise ValueError(
            f"JAX_PROCESS_ID={number!r} must be a number below JAX_NUM_PROCESSES={count!r}, counted from 0."
        )
    if int(count) == 1:
        return None
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(number))
