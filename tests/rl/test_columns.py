"""GRPO of a model that reads a column: each prompt's source reaches sampler, scores, parts, checkpoints."""

import functools
import json

import chex
import jax
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.objectives import policy_gradient, supervised
from jaxft.parallel import make_mesh
from jaxft.train import Checkpoints, fit
from tests.contracts.test_encoder_decoder import LENGTH, START, Translator, initial, task
from tests.processes import run_processes

MODEL, GROUP = Translator(), 8


class Words:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids, skip_special_tokens=False):
        """Numbers with spaces between them."""
        return " ".join(map(str, ids))


def right_words(completions, records):
    """The share of words that are translated rightly."""
    pairs = zip(completions, records, strict=True)
    return [float(np.mean(np.array(c.split(), int) == r["answer"])) for c, r in pairs]


def run(params, steps, directory=None, resume=False, mesh=None):
    rows = task(5)
    records = [{"answer": answer} for answer in rows["tokens"][:, 1:]]
    prompts = rl.Prompts([[START]] * 256, 8, records, columns={"source": rows["source"]})
    credit, objective = rl.grpo(functools.partial(policy_gradient, MODEL.forward), GROUP)
    sample = rl.answers(MODEL, Words(), right_words, SamplingConfig(LENGTH), GROUP)
    old = rl.add_old_policy(MODEL.forward, 1.0)
    batches = rl.collect(prompts, sample, credit, old, updates=2, mesh=mesh)
    kept = directory and Checkpoints(directory, every=100, resume=resume)
    return fit(
        params, objective, optax.adam(1e-2), batches, steps=steps, checkpoints=kept, mesh=mesh
    )


@pytest.fixture(scope="module")
def start():
    """Params that translate some words rightly."""
    args = initial(jax.random.key(0)), supervised(MODEL.forward), optax.adam(1e-2)
    return fit(*args, [task(0)] * 12)[0].params


def test_a_policy_that_reads_a_column_learns_and_is_cut_inside_a_rollout(start, tmp_path):
    whole, history = run(start, 61)
    reward = [row["reward"] for row in history]
    assert np.mean(reward[-10:]) > np.mean(reward[:10]) + 0.2
    assert max(row["gap"] for row in history[::2]) < 1e-4  # scored with the source that was read
    run(start, 21, tmp_path)
    again, more = run(start, 61, tmp_path, resume=True)
    chex.assert_trees_all_equal(*(s._replace(key=None) for s in (whole, again)))
    assert [row["reward"] for row in more] == reward
    assert whole.carry["experience"]["rollout"]["source"].shape == (8 * GROUP, LENGTH)


def test_columns_lie_over_a_mesh_like_rows(start):
    mesh = make_mesh(data=4, fsdp=2)
    one, many = (run(start, 3, mesh=m)[1] for m in (None, mesh))
    np.testing.assert_allclose(*([r["loss"] for r in h] for h in (one, many)), atol=1e-4)
    assert [r["reward"] for r in one] == [r["reward"] for r in many]


HOST = """
import json, sys
import jax
from jaxft.parallel import connect_hosts, make_mesh
connect_hosts()
import numpy as np
from tests.rl.test_columns import run
from tests.contracts.test_encoder_decoder import initial

shapes = jax.eval_shape(initial, jax.random.key(0))
leaves = np.load(f"{sys.argv[1]}/start.npz")
params = jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in leaves.files])
mesh = make_mesh(fsdp=-1)
kept = f"{sys.argv[1]}/checkpoints"
run(params, 3, kept, mesh=mesh)  # cut inside a rollout, whose rows lie over both processes
_, rows = run(params, 5, kept, resume=True, mesh=mesh)
print(json.dumps([[row["loss"], row["reward"]] for row in rows]))
"""


def test_a_rollout_of_two_processes_is_that_of_one(start, tmp_path):
    np.savez(tmp_path / "start.npz", *jax.tree.leaves(start))
    codes, outputs, errors = run_processes(2, ["-c", HOST, tmp_path], devices=1)
    assert codes == [0, 0], errors
    wanted = [[row["loss"], row["reward"]] for row in run(start, 5)[1]]
    for output in outputs:
        np.testing.assert_allclose(json.loads(output.splitlines()[-1]), wanted, atol=1e-4)
