import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.parallel import make_mesh, shard_params
from jaxft.train import check_memory, memory, state_bytes

SCRIPT = """
import resource
import jax, jax.numpy as jnp
from jaxft.train import keep_memory_warm

# The product takes 43 MB; glibc gives blocks above 32 MB back to the kernel at once.
f = jax.jit(lambda x: jnp.abs(x @ x.T) @ x)
x = jnp.ones((3300, 4))

def late_steps_with_faults(steps):
    faults = []
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        f(x).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sum(number > 1000 for number in faults[-10:])

print(late_steps_with_faults(15))
assert keep_memory_warm()
print(late_steps_with_faults(30))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_stop_faulting_in_their_temporaries():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    cold, warm = map(int, found.split())
    assert cold == 10
    # The heap grows now and then while small blocks settle between the large ones: none to 2 of 10.
    assert warm <= 5


def test_it_does_nothing_elsewhere(monkeypatch):
    import jax

    from jaxft.train import keep_memory_warm

    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        assert keep_memory_warm() is False
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert keep_memory_warm() is False
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert keep_memory_warm() is False


def params():
    return {
        "layers": {"0": {"mlp": {"up": {"kernel": jnp.zeros((16, 64))}}}},
        "head": {"kernel": jnp.zeros((16, 32), jnp.bfloat16)},
    }


def test_bytes_of_a_run_are_those_of_its_arrays():
    size = 16 * 64 * 4 + 16 * 32 * 2
    assert state_bytes(params()) == {"weights": size}
    needed = state_bytes(params(), optax.adam(1e-3))
    assert needed == {
        "weights": size,
        "gradients": size,
        "optimizer": 2 * size + 4,
    }  # and a counter


def test_bytes_on_a_mesh_are_those_of_one_device():
    mesh = make_mesh(fsdp=4, tensor=2)
    device = mesh.devices.flat[0]
    placed = jax.tree.leaves(shard_params(params(), mesh))
    ours = [s.data.nbytes for leaf in placed for s in leaf.addressable_shards if s.device == device]
    assert state_bytes(params(), mesh=mesh) == {"weights": sum(ours)}
    assert sum(ours) < state_bytes(params())["weights"]


def test_what_cannot_fit_is_refused_with_what_it_needs(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda device: 10 * 10**9)
    devices = jax.devices()[:2]
    check_memory({"weights": 4 * 10**9}, devices, "no")
    with pytest.raises(
        ValueError, match=r"at least 12.0 GB \(weights 8.0 GB, gradients 4.0 GB\), and 10.0"
    ):
        check_memory(
            {"weights": 4 * 10**9, "gradients": 2 * 10**9}, devices, "take less"
        )  # one memory
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    check_memory({"weights": 10**15}, devices, "no")


def test_memory_of_this_machine_is_known():
    assert np.isfinite(memory.device_memory(jax.devices()[0]))
