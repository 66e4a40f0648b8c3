"""Two processes with two devices each, as on a pod: `fit` from one script started twice."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import os, signal, sys
from pathlib import Path

rank, port, directory, stop = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "stop"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
import _worker
from jaxft.parallel import make_mesh
from jaxft.train import Callback, jsonl_log, run_main

class Rows(_worker.Batches):  # this process's half of each batch
    def __next__(self):
        return jax.tree.map(lambda x: x[4 * rank : 4 * rank + 4], super().__next__())

def ask_one_process_to_stop(row):
    if stop and rank == 1 and row["step"] == 3:
        os.kill(os.getpid(), signal.SIGTERM)

callbacks = [jsonl_log(directory / "metrics.jsonl"), ask_one_process_to_stop]
options = dict(batches=Rows(), mesh=make_mesh(data=2, fsdp=2), callbacks=callbacks)
run_main(lambda config: _worker.train(directory, every=5, **options), None)
"""


def start_both(directory, what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}",
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", SCRIPT]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(directory), what],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    return [process.returncode for process in both], errors


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_both_resume(problem, tmp_path):
    codes, errors = start_both(tmp_path, "stop")
    assert codes == [75, 75], errors
    done = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 3 <= done < problem.STEPS
    codes, errors = start_both(tmp_path, "go on")
    assert codes == [0, 0], errors
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, problem.STEPS + 1))
    _, alone = problem.train(tmp_path / "alone")
    losses = lambda rows: [row["loss"] for row in rows]
    np.testing.assert_allclose(losses(rows), losses(alone), rtol=1e-5)
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in alone]
