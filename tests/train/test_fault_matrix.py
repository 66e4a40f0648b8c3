"""Faults at random points: nothing is lost beyond the last whole checkpoint, and nothing diverges in silence.

`make faults` takes twenty points of each kind; FAULT_SEED draws others.
"""

import json
import os
import random
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data, train
from jaxft.metrics import Mean
from jaxft.parallel import make_mesh
from tests.processes import ROOT, child_flags, run_processes
from tests.train import faults

POINTS, SEED = int(os.environ.get("FAULT_POINTS", 1)), os.environ.get("FAULT_SEED", "0")
MANY = "FAULT_POINTS" in os.environ
# Each process takes seconds; four hosts that go on are also in tests/experiments/test_hosts.py.
HOSTS, LATER = (4, [1, 2, 4]) if MANY else (2, [1])


@pytest.fixture(scope="module")
def losses(problem, tmp_path_factory):
    """Losses of the run that nothing interrupts."""
    _, history = problem.train(tmp_path_factory.mktemp("whole"))
    return [row["loss"] for row in history]


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_nothing_is_lost_and_nothing_diverges(losses, tmp_path):
    kinds = (*faults.PROCESS_FAULTS, *faults.STORAGE_FAULTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": child_flags()}
    # All lives compile the same small programs: only the first need do so.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, faults.__file__, tmp_path, POINTS, SEED, *kinds]
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    points = [json.loads(line) for line in result.stdout.splitlines()]
    assert [point["kind"] for point in points] == [kind for kind in kinds for _ in range(POINTS)]
    for i, point in enumerate(points):
        kind, directory = point["kind"], tmp_path / point["kind"] / str(i % POINTS)
        said = (directory / "output.txt").read_text()
        assert point["codes"][1] == 0, (point, said)
        assert logged(directory) == losses, point
        begun = point["lives"][-1] if len(point["lives"]) > 1 else len(losses) + 1
        aside = list((directory / "checkpoints").glob("corrupt-*"))
        if kind in faults.PROCESS_FAULTS:
            ended = {"sigterm": (75, 0), "full": (2, 0)}.get(kind, (-9, 0))
            assert point["codes"][0] in ended, (point, said)
            assert begun == point["newest"] + 1 and not aside, (point, said)
        else:  # Taken as it is, to the same losses, or set aside, aloud, for the one before.
            assert begun == point["newest"] + 1 or aside and "is moved to" in said, (point, said)


# Each process takes its part of each batch; one of them may kill itself.
HOST = """
import functools, os, signal, sys, threading, time
import jax
# Of a process that waits for the killed one at a checkpoint; JAX's own 100 s prove no more.
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, heartbeat_timeout_seconds=20
)
from jaxft.parallel import connect_hosts, make_mesh
from jaxft.train import Callback, jsonl_log, run_main
connect_hosts()
from pathlib import Path
from tests.train import faults

module, directory = faults.worker(), Path(sys.argv[1])
victim, first, delay = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
rank, part = jax.process_index(), module.ROWS // jax.process_count()

class Rows(module.Batches):
    def __next__(self):
        return jax.tree.map(lambda x: x[part * rank : part * (rank + 1)], super().__next__())

def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def at(step, state):
    if rank == victim and step == first:
        threading.Thread(target=kill).start()

callbacks = [jsonl_log(directory / "metrics.jsonl"), Callback(on_step=at)]
options = dict(batches=Rows(), mesh=make_mesh(fsdp=-1), callbacks=callbacks)
run_main(lambda _: module.train(directory, every=4, **options), None)
"""


@pytest.mark.parametrize("point", range(POINTS))
def test_one_of_several_processes_is_killed_and_others_go_on(problem, losses, tmp_path, point):
    rng = random.Random(f"{SEED} host {point}")
    fault = [rng.randrange(HOSTS), rng.randrange(1, len(losses) - 1), rng.uniform(0, 0.03)]
    codes, _, errors = run_processes(HOSTS, ["-c", HOST, tmp_path, *fault], devices=1)
    assert codes[fault[0]] == -9 and 0 not in codes, (fault, codes, errors)
    newest = (faults.whole_checkpoints(tmp_path) or [0])[-1]
    assert newest >= (fault[1] - 1) // 4 * 4 - 4
    count = rng.choice(LATER)
    if count == 1:
        problem.train(tmp_path, every=4, mesh=make_mesh(fsdp=-1))
    else:
        codes, _, errors = run_processes(count, ["-c", HOST, tmp_path, -1, 0, 0], devices=1)
        assert codes == [0] * count, (fault, errors)
    np.testing.assert_allclose(logged(tmp_path), losses, rtol=1e-5)
    assert not list((tmp_path / "checkpoints").glob("corrupt-*"))


def rows_of(path, batch_size=4):
    """Batches of a JSONL file of token ids, as the scripts' are."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records = [
        data.Tokenised(np.array(line["tokens"]), np.ones(len(line["tokens"]), np.float32))
        for line in lines
    ]
    return data.batches(records, batch_size=batch_size, max_length=8, seed=0, packing=False)


@pytest.mark.parametrize("point", range(POINTS))
def test_a_data_file_that_lost_lines_is_refused(tmp_path, point):
    rng = random.Random(f"{SEED} shortened {point}")
    lines = [json.dumps({"tokens": [rng.randrange(9) for _ in range(8)]}) for _ in range(24)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))

    def objective(params, batch, key):
        del key
        errors = (params[jnp.asarray(batch["tokens"])] - 1.0) ** 2
        loss = Mean.of(errors, jnp.ones(errors.shape))
        return loss.value, {"loss": loss}

    def run(steps):
        checkpoints = train.Checkpoints(tmp_path / "checkpoints", every=2, resume=True)
        adam = train.make_optimizer(1e-2, total_steps=12)
        state, history = train.fit(
            jnp.zeros(9), objective, adam, rows_of(path), steps=steps, checkpoints=checkpoints
        )
        return [row["loss"] for row in history]

    before = run(rng.randrange(1, 11))
    path.write_text("\n".join(lines[: rng.randrange(4, 24)]))
    with pytest.raises(data.DataError, match="the data is not that of the checkpoint"):
        run(12)
    path.write_text("\n".join(lines))  # Nothing of the run was harmed by the attempt.
    assert run(12)[: len(before)] == before
