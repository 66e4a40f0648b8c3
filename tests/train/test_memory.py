import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import jax, jax.numpy as jnp
from jaxft.train import keep_memory_warm

if sys.argv[1] == "warm":
    assert keep_memory_warm()
# The product takes 43 MB; glibc gives blocks above 32 MB back to the kernel at once.
f = jax.jit(lambda x: jnp.sin(x @ x.T) @ x)
x = jnp.ones((3300, 4))
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(number > 1000 for number in faults[20:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_stop_faulting_in_their_temporaries():
    def late_steps_with_faults(mode):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""}
        command = [sys.executable, "-c", SCRIPT, mode]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert late_steps_with_faults("cold") == 20
    # The heap grows now and then while small blocks settle between the large ones: none to 3 of 20.
    assert late_steps_with_faults("warm") <= 10


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
