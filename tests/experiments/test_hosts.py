"""Scripts in several processes, as on several hosts: the same losses as in one, and after a crash too."""

import json

import numpy as np
import pytest

from tests.processes import ROOT, run_processes

STEPS = 6
SMALL = ["--smoke", "--batch-size", 4, "--schedule", "constant", "--save-steps", 3]
SFT = [*SMALL, "--eval-steps", STEPS, "--max-steps", STEPS, "--no-accuracy"]

# sft.py, whose process 1 is killed after step 4, once the checkpoint of step 3 is there.
CRASH = """
import os, pathlib, signal, sys, time
import tyro
from experiments import _training as shared, sft
from jaxft import train

ordinary = shared.callbacks

def crash(row):
    if row["step"] == 4 and os.environ["JAX_PROCESS_ID"] == "1":
        while not pathlib.Path(config.output_dir, "checkpoints", "3").exists():
            time.sleep(0.02)
        time.sleep(2)  # In the write, the other would wait for JAX's heartbeats to fail: a minute.
        os.kill(os.getpid(), signal.SIGKILL)

shared.callbacks = lambda *args: [*ordinary(*args), crash]
config = tyro.cli(sft.Config)
train.run_main(sft.main, config)
"""


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_hosts_of_which_one_crashes_and_four_that_go_on_give_the_losses_of_one(tmp_path):
    alone, output = tmp_path / "alone", tmp_path / "several"
    script = ROOT / "experiments/sft.py"
    codes, _, errors = run_processes(1, [script, *SFT, "--output-dir", alone], devices=1)
    assert codes == [0], errors

    flags = [*SFT, "--output-dir", output]
    codes, _, errors = run_processes(2, ["-c", CRASH, *flags, "--fsdp", -1])
    assert codes == [5, -9], errors
    assert "process 1 did not end with this one" in errors[0] and "Traceback" not in errors[0]
    assert [row["step"] for row in rows(output)][:3] == [1, 2, 3]

    sizes = ["--fsdp", 4, "--tensor", 2]
    codes, outputs, errors = run_processes(4, [script, *flags, *sizes, "--resume"])
    assert codes == [0] * 4, errors
    assert "adapter saved" in outputs[0]
    assert not any("saved" in output for output in outputs[1:])  # The first alone speaks.
    ours, theirs = rows(output), rows(alone)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "eval/loss", "grad_norm"):
        values = [[row[name] for row in run if name in row] for run in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    assert (output / "adapter/adapter_config.json").exists()
    assert not list((output / "checkpoints").glob("corrupt-*"))


@pytest.mark.slow
def test_preferences_in_two_processes(tmp_path):
    script = ROOT / "experiments/preference.py"
    runs = []
    for count, more in ((1, []), (2, ["--fsdp", -1, "--adapter", "full"])):
        output = tmp_path / str(count)
        command = [
            script,
            *SMALL,
            "--adapter",
            "full",
            *more,
            "--max-steps",
            2,
            "--output-dir",
            output,
        ]
        codes, _, errors = run_processes(count, command, devices=count)
        assert codes == [0] * count, errors
        runs.append(rows(output))
    for name in ("loss", "eval/loss"):
        values = [[row[name] for row in run if name in row] for run in runs]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        ("reinforce.py", ["--algorithm", "rloo", "--reward-kl", 0.1, "--kl-target", 1.0]),
        ("preference.py", ["--loss", "hypo", "--batch-size", 2]),
    ],
)
def test_answers_sampled_in_two_processes_are_those_of_one(tmp_path, script, flags):
    runs = []
    small = ["--smoke", "--adapter", "full", "--max-steps", 2, "--temperature", 1.0]
    small = small if script == "reinforce.py" else small[:-2]
    for count, more in ((1, []), (2, ["--fsdp", -1])):
        output = tmp_path / str(count)
        command = [ROOT / "experiments" / script, *small, *flags, *more, "--output-dir", output]
        codes, _, errors = run_processes(count, command, devices=1)
        assert codes == [0] * count, errors
        runs.append(rows(output))
    for name in ("loss", "kl", "grad_norm"):
        values = [[row[name] for row in run if name in row] for run in runs]
        assert len(values[0]) == len(values[1]) == 2 and any(values[0]), name
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=name)
