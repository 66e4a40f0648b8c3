"""Scripts in several processes, as on several hosts: the same losses as in one, and after a crash too."""

import json

import numpy as np
import pytest
import tyro

from experiments import reinforce, sft
from tests.processes import run_processes

STEPS = 6
SFT = ["--smoke", "--batch-size", 4, "--schedule", "constant", "--save-steps", 3]
SFT += ["--eval-steps", STEPS, "--max-steps", STEPS, "--no-accuracy"]
RL = ["--smoke", "--adapter", "full", "--max-steps", 2, "--group-size", 4]
RL += ["--algorithm", "rloo", "--reward-kl", 0.1, "--kl-target", 1.0]

# reinforce.py, and then sft.py, whose process 1 is killed after step 4, once the checkpoint of step 3 is
# there. In the same processes, whose imports take longer than the runs.
BOTH = """
import json, os, pathlib, signal, sys, time
import tyro
from experiments import reinforce, sft
from experiments.cli import training as shared
from jaxft import train

ordinary, given = shared.callbacks, json.loads(sys.argv[1])
config = tyro.cli(sft.Config, args=given["sft"])

def crash(row):
    if row["step"] == 4 and os.environ["JAX_PROCESS_ID"] == "1":
        while not pathlib.Path(config.output.output_dir, "checkpoints", "3").exists():
            time.sleep(0.02)
        time.sleep(2)  # In the write, the other would wait for JAX's heartbeats to fail: a minute.
        os.kill(os.getpid(), signal.SIGKILL)

train.run_main(reinforce.main, tyro.cli(reinforce.Config, args=given["reinforce"]))
shared.connect_hosts = lambda *_: True  # They are.
shared.callbacks = lambda *args: [*ordinary(*args), crash]
train.run_main(sft.main, config)
"""


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run_here(script, flags):
    """Runs in this process, which need not import everything anew."""
    flags = list(map(str, flags))
    script.main(tyro.cli(script.Config, args=flags))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """(directory, flags of both runs, exit codes, outputs, errors) of two processes with two devices each."""
    place = tmp_path_factory.mktemp("hosts")
    # Without rewards that differ the gradient is rounding, which Adam would make steps of.
    judge = place / "judge.py"
    # Most answers of a random model of bytes are no text, and alike: each call gets another number.
    judge.write_text(
        "import itertools\nnumbers = itertools.count()\n"
        "def score(completion, record):\n    return next(numbers) % 3\n"
    )
    flags = {"reinforce": [*RL, "--judge", f"{judge}:score"], "sft": SFT}
    there = {
        name: list(map(str, [*given, "--fsdp", -1, "--output-dir", place / name]))
        for name, given in flags.items()
    }
    return place, flags, *run_processes(2, ["-c", BOTH, json.dumps(there)])


def test_answers_sampled_in_two_processes_are_those_of_one(several, tmp_path):
    place, flags, _, outputs, errors = several
    assert "model saved" in outputs[0], errors
    assert not any("saved" in output for output in outputs[1:])  # Only the first prints.
    run_here(reinforce, [*flags["reinforce"], "--output-dir", tmp_path])
    runs = [rows(tmp_path), rows(place / "reinforce")]
    for name in ("loss", "kl", "grad_norm"):
        values = [[row[name] for row in run if name in row] for run in runs]
        # On policy RLOO's loss is 0 except for rounding; its gradient is not.
        assert len(values[0]) == len(values[1]) == 2 and (any(values[0]) or name == "loss"), name
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_run_of_two_hosts_of_which_one_crashed_goes_on_over_another_mesh_to_the_losses_of_one(
    several, tmp_path
):
    """Here, over one host; two hosts that go on are in tests/train/test_processes.py."""
    place, flags, codes, _, errors = several
    output = place / "sft"
    assert codes == [5, -9], errors
    assert "process 1 did not end with this one" in errors[0] and "Traceback" not in errors[0]
    assert [row["step"] for row in rows(output)][:3] == [1, 2, 3]
    run_here(sft, [*flags["sft"], "--output-dir", tmp_path])
    sizes = ["--fsdp", 2, "--tensor", 2, "--data-axis", 2]
    run_here(sft, [*flags["sft"], *sizes, "--resume", "--output-dir", output])
    ours, theirs = rows(output), rows(tmp_path)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "eval/loss", "grad_norm"):
        values = [[row[name] for row in run if name in row] for run in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    assert (output / "adapter/adapter_config.json").exists()
    assert not list((output / "checkpoints").glob("corrupt-*"))
