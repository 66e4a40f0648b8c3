"""Two processes with two devices each, as on a pod: `fit` from one script started twice."""

import json
from pathlib import Path

import numpy as np

from tests.processes import run_processes

SCRIPT = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
directory = Path(sys.argv[2])
import jax
from jaxft.parallel import connect_hosts, make_mesh
connect_hosts()
rank = jax.process_index()
import _worker
from jaxft.train import Callback, jsonl_log, run_main

class Rows(_worker.Batches):  # this process's half of each batch
    def __next__(self):
        return jax.tree.map(lambda x: x[4 * rank : 4 * rank + 4], super().__next__())

def ask_one_process_to_stop(row):
    if rank == 1 and row["step"] == 3:
        os.kill(os.getpid(), signal.SIGTERM)

def train(config, *callbacks):
    callbacks = [jsonl_log(directory / "metrics.jsonl"), *callbacks]
    options = dict(batches=Rows(), mesh=make_mesh(data=2, fsdp=2, slices=2), callbacks=callbacks)
    return _worker.train(directory, every=5, **options)

# Both lives in the same processes, whose imports take longer than the runs.
try:
    run_main(lambda config: train(config, ask_one_process_to_stop), None)
except SystemExit as stopped:
    print(stopped.code, len((directory / "metrics.jsonl").read_text().splitlines()))
run_main(train, None)
"""


def test_a_signal_to_one_of_two_processes_stops_both_and_both_resume(problem, tmp_path):
    command = ["-c", SCRIPT, Path(__file__).parent, tmp_path]
    codes, outputs, errors = run_processes(2, command)
    assert codes == [0, 0], errors
    for output in outputs:
        code, done = map(int, output.split())
        assert code == 75 and 3 <= done < problem.STEPS
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, problem.STEPS + 1))
    _, alone = problem.train(tmp_path / "alone")
    losses = lambda rows: [row["loss"] for row in rows]
    np.testing.assert_allclose(losses(rows), losses(alone), rtol=1e-5)
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in alone]
