import pytest

from jaxft.parallel.hosts import _options, connect_hosts
from tests.processes import run_processes

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


MEET = """
import sys, time
from jaxft.parallel import HostLostError, connect_hosts, meet, to_host, written_once
connect_hosts(timeout=100)
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

rank = jax.process_index()
sharding = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))
value = jax.make_array_from_callback((8,), sharding, lambda index: np.arange(8.0)[index])
assert to_host({"a": [value]})["a"][0].tolist() == list(range(8))
written_once(lambda: print("written by", rank), "a line")

def fails():
    raise OSError("disk full")

try:
    written_once(fails, "a file")
except (OSError, RuntimeError) as error:
    print(type(error).__name__, error)
meet("here")
if rank == 0:
    try:
        meet("there", timeout=0.5)
    except HostLostError as error:
        print(error)
from jaxft.parallel import make_mesh
from jaxft.train.batches import place_batch
batch = {"tokens": np.zeros((2, 4))}
assert place_batch(batch, make_mesh(data=2, context=2))["tokens"].shape == (4, 4)
try:
    place_batch(batch, make_mesh(context=4))
except ValueError as error:
    print(error)
meet("the end")
"""


def test_processes_meet_gather_write_once_and_miss_one_another():
    codes, outputs, errors = run_processes(2, ["-c", MEET])
    assert codes == [0, 0], errors
    first = "written by 0\nOutputError a file could not be written: disk full"
    assert first in outputs[0]
    assert "\nthere: process 1 of 2 did not arrive within 0.5 s." in outputs[0]
    assert all("context=4 lays the same rows of a batch over several" in out for out in outputs)
    assert "RuntimeError process 0 could not write a file; its own message says why." in outputs[1]
    assert "written" not in outputs[1]
