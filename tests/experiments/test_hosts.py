"""Scripts in several processes, as on several hosts: the same losses as in one, and after a crash too."""

import json

import numpy as np
import tyro

from experiments import reinforce, sft
from tests.processes import ROOT, run_processes

STEPS = 6
SFT = ["--smoke", "--batch-size", 4, "--schedule", "constant", "--save-steps", 3]
SFT += ["--eval-steps", STEPS, "--max-steps", STEPS, "--no-accuracy"]

# sft.py, whose process 1 is killed after step 4, once the checkpoint of step 3 is there.
CRASH = """
import os, pathlib, signal, sys, time
import tyro
from experiments import sft
from experiments.cli import training as shared
from jaxft import train

ordinary = shared.callbacks

def crash(row):
    if row["step"] == 4 and os.environ["JAX_PROCESS_ID"] == "1":
        while not pathlib.Path(config.output.output_dir, "checkpoints", "3").exists():
            time.sleep(0.02)
        time.sleep(2)  # In the write, the other would wait for JAX's heartbeats to fail: a minute.
        os.kill(os.getpid(), signal.SIGKILL)

shared.callbacks = lambda *args: [*ordinary(*args), crash]
config = tyro.cli(sft.Config)
train.run_main(sft.main, config)
"""


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run_here(script, flags):
    """Runs in this process, which need not import everything anew."""
    flags = list(map(str, flags))
    script.main(tyro.cli(script.Config, args=flags))


def test_two_hosts_of_which_one_crashes_and_that_go_on_over_another_mesh_give_the_losses_of_one(
    tmp_path,
):
    alone, output = tmp_path / "alone", tmp_path / "several"
    run_here(sft, [*SFT, "--output-dir", alone])
    flags = [*SFT, "--output-dir", output]
    codes, _, errors = run_processes(2, ["-c", CRASH, *flags, "--fsdp", -1])
    assert codes == [5, -9], errors
    assert "process 1 did not end with this one" in errors[0] and "Traceback" not in errors[0]
    assert [row["step"] for row in rows(output)][:3] == [1, 2, 3]

    sizes = ["--fsdp", 2, "--tensor", 2]
    script = ROOT / "experiments/sft.py"
    codes, outputs, errors = run_processes(2, [script, *flags, *sizes, "--resume"])
    assert codes == [0] * 2, errors
    assert "adapter saved" in outputs[0]
    assert not any("saved" in output for output in outputs[1:])  # Only the first prints.
    ours, theirs = rows(output), rows(alone)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "eval/loss", "grad_norm"):
        values = [[row[name] for row in run if name in row] for run in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    assert (output / "adapter/adapter_config.json").exists()
    assert not list((output / "checkpoints").glob("corrupt-*"))


def test_answers_sampled_in_two_processes_are_those_of_one(tmp_path):
    # Without rewards that differ the gradient is rounding, which Adam would make steps of.
    judge = tmp_path / "judge.py"
    # Most answers of a random model of bytes are no text, and alike: each call gets another number.
    judge.write_text(
        "import itertools\nnumbers = itertools.count()\n"
        "def score(completion, record):\n    return next(numbers) % 3\n"
    )
    flags = ["--smoke", "--adapter", "full", "--max-steps", 2, "--judge", f"{judge}:score"]
    flags += ["--algorithm", "rloo", "--reward-kl", 0.1, "--kl-target", 1.0]
    run_here(reinforce, [*flags, "--output-dir", tmp_path / "one"])
    command = [ROOT / "experiments/reinforce.py", *flags, "--fsdp", -1]
    codes, _, errors = run_processes(2, [*command, "--output-dir", tmp_path / "two"], devices=1)
    assert codes == [0, 0], errors
    runs = [rows(tmp_path / "one"), rows(tmp_path / "two")]
    for name in ("loss", "kl", "grad_norm"):
        values = [[row[name] for row in run if name in row] for run in runs]
        # On policy RLOO's loss is 0 except for rounding; its gradient is not.
        assert len(values[0]) == len(values[1]) == 2 and (any(values[0]) or name == "loss"), name
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=name)
