import os
import socket
import subprocess
import sys

import pytest

from jaxft.parallel.hosts import _options, connect_hosts

ADDRESS = "host0:1234"


def test_one_process_is_left_alone(monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert connect_hosts() is False
    assert _options({"SLURM_NTASKS": "1", "JAX_COORDINATOR_ADDRESS": ADDRESS}) is None
    assert _options(by_hand(1, 0)) is None


def by_hand(count, number):
    return {
        "JAX_COORDINATOR_ADDRESS": ADDRESS,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }


def test_several_are_found():
    assert _options({"SLURM_NTASKS": "4"}) == {}
    assert _options({"OMPI_COMM_WORLD_SIZE": "2"}) == {}
    expected = dict(coordinator_address=ADDRESS, num_processes=4, process_id=3)
    assert _options(by_hand(4, 3)) == expected


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not"),
        (by_hand(2, 2), "must be a number below"),
        (by_hand("two", 0), "must be a number below"),
    ],
)
def test_what_does_not_fit_together_is_an_error(environment, message):
    with pytest.raises(ValueError, match=message):
        _options(environment)


@pytest.mark.slow
def test_two_processes_meet():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from jaxft.parallel import connect_hosts; import jax\n"
        "connect_hosts(timeout=int(sys.argv[1])); print(jax.process_index(), jax.process_count())"
    )

    def start(count, number, port, timeout):
        variables = by_hand(count, number) | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        return subprocess.Popen(
            [sys.executable, "-c", code, str(timeout)],
            env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    both = [start(2, number, port, 100) for number in (0, 1)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert outputs == ["0 2\n", "1 2\n"]
