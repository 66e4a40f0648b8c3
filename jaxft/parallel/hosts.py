"""Start-up of a run on several hosts."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers that start several processes say how many, each in its own variable.
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def connect_hosts(distributed: bool = False, *, timeout: int = 300) -> bool:
    """Joins this process with those on the other hosts, if there are any; True if it did.

    Call it before anything else of JAX. It does something if JAX_NUM_PROCESSES is set (then with
    JAX_COORDINATOR_ADDRESS, host:port of process 0, and JAX_PROCESS_ID), under SLURM or Open MPI with more
    than one task, and if `distributed` says so: on Cloud TPU slices and Kubernetes, where jax.distributed
    finds the others by itself.

    Args:
        distributed: this is one of several hosts.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: for an incomplete set of variables.
        RuntimeError: if the others do not come in time.
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
            f"{who} did not meet the others{where} within {timeout} s: {error}. Every host must start the "
            "same command at about the same time, and reach process 0 on that port."
        ) from error
    return True


def _options(environment: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize; {} where it finds them itself, None for one process."""
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
