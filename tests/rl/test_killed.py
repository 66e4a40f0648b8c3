"""A run that samples in a thread, killed by SIGKILL in its process: it trains on each draw exactly once."""

import json
import signal

from tests.processes import run_processes
from tests.train.faults import whole_checkpoints

DRAWS, KILLED = 14, 6
# Each prompt is one draw, and its gradient adds 1 to its entry of `seen`, which checkpoints hold.
RUN = f"""
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jaxft import rl
from jaxft.train import Checkpoints, fit, jsonl_log

directory, killed = Path(sys.argv[1]), int(sys.argv[2])
asked = []

def sample(params, asked_, key):
    asked.append(asked_.ids[0][0])
    print("sampled", asked[-1], flush=True)
    time.sleep(0.02)  # so that the thread is sampling when the process is killed
    ones = np.ones((2, 3), np.int32)
    return dict(
        tokens=ones * asked[-1], segment_ids=ones, positions=np.cumsum(ones, axis=1) - 1,
        completion_mask=ones[:, 1:] > 0, sampler_log_probs=np.zeros((2, 2), np.float32),
        truncated=np.zeros(2, bool), rewards=[0.0, 1.0],
    )

def objective(params, batch, key):
    prompt = batch["tokens"][0, 0]
    return params["seen"][prompt], dict(prompt=prompt, staleness=batch["stats"]["staleness"][0])

def kill(row):
    if row["step"] == killed:
        os.kill(os.getpid(), signal.SIGKILL)

prompts = rl.Prompts([[i] for i in range({DRAWS})], 1)
credit = lambda rewards, batch: dict(advantages=rewards)
batches = rl.collect(prompts, sample, credit, max_staleness=3, rollouts={DRAWS})
state, _ = fit(
    dict(seen=jnp.zeros({DRAWS})), objective, optax.sgd(-1.0), batches, steps={DRAWS},
    callbacks=[jsonl_log(directory / "rows.jsonl"), kill],
    checkpoints=Checkpoints(directory / "checkpoints", every=2, resume=True),
)
print("seen", state.params["seen"].tolist())
print("draws", int(state.carry["experience"]["draws"]))
"""


def test_each_draw_is_trained_on_once_through_a_kill(tmp_path):
    life = lambda killed: run_processes(1, ["-c", RUN, tmp_path, killed], devices=1)
    (code,), (first,), _ = life(KILLED)
    assert code == -signal.SIGKILL
    newest = (whole_checkpoints(tmp_path) or [0])[-1]
    assert newest < DRAWS and first.count("sampled") > newest
    (code,), (second,), (error,) = life(0)
    assert code == 0, error
    assert f"seen {[1.0] * DRAWS}" in second and f"draws {DRAWS}" in second
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, DRAWS + 1))
    # It begins at the draw behind the checkpoint: what was sampled ahead of it is sampled again.
    draws = [row["prompt"] for row in rows]
    again = [int(line.split()[1]) for line in second.splitlines() if line.startswith("sampled")]
    assert sorted(draws) == list(range(DRAWS)) and again == draws[newest:]
    assert max(row["staleness"] for row in rows) <= 3
